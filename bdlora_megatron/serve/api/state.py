"""What all requests share: settings, the engine, models, keys, limits."""

from __future__ import annotations

import hmac
import logging
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from fastapi import Request

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.client import EngineClient
from bdlora_megatron.serve.api.errors import ASKED, APIError
from bdlora_megatron.serve.api.history import Faults, History
from bdlora_megatron.serve.api.metrics import Metrics
from bdlora_megatron.serve.api.own_text import own_text
from bdlora_megatron.serve.api.text import Tokenizer
from bdlora_megatron.serve.api.tools.formats import Written, look_at
from bdlora_megatron.serve.files import Fingerprint
from bdlora_megatron.serve.messages import Ready
from bdlora_megatron.serve.settings import ApiKey, ServeSettings

__all__ = ["APIServer", "AdapterCard"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AdapterCard:
    """An adapter as clients see it.

    Attributes:
        name: What requests call it.
        path: Its folder.
        version: Counted from 1 each time that it is loaded.
        created: When it was loaded last, in seconds since 1970.
        files: What its files were like then.
        tokenizer: Its own, where it has one and may use it.
        invocation_tokens: From which tokens on it acts; None for every token.
    """

    name: str
    path: Path
    version: int = 1
    created: int = field(default_factory=lambda: int(time.time()))
    files: Fingerprint = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    invocation_tokens: tuple[int, ...] | None = None


class APIServer:
    """The state of the API server.

    Attributes:
        base_name: What requests call the base model.
        adapters: By name, those that new requests may use.
        refused: By name, why the other adapters of the settings are not served.
        changing: Names that are being loaded or unloaded, with which of the two.
        draining: No further requests are taken.
        open_answers: Answers that clients have not had to their end, by adapter; None stands for
            the base model. What the engine has finished and a slow client has not read is one.
        history: What was served in the last minutes.
        faults: The errors that clients were last told.
    """

    def __init__(self, settings: ServeSettings, tokenizer: Tokenizer) -> None:
        """Start with the adapters of the settings.

        Raises:
            ConfigError: ``strict_adapters``, and what an adapter brings along can't be read.
        """
        self.settings = settings
        # Once: where no name is set, it is found by resolving a path.
        self.base_name = settings.base_name
        self.tokenizer = tokenizer
        self.client = EngineClient()
        self.history, self.faults = History(), Faults()
        self.metrics = Metrics(self.client, self.base_name, settings, self.faults)
        self.started = int(time.time())
        self.draining = False
        self.open_answers: Counter[str | None] = Counter()
        self.adapters: dict[str, AdapterCard] = {}
        self.refused: dict[str, str] = {}
        for name, path in settings.adapters.items():
            card = AdapterCard(name, Path(path))
            try:
                self.give_text(card)
            except ConfigError as error:
                if settings.strict_adapters:
                    raise
                self.refuse({name: str(error)})
            else:
                self.adapters[name] = card
        self.changing: dict[str, str] = {}
        self._written: WeakKeyDictionary[Tokenizer, Written] = WeakKeyDictionary()

    # --- adapters ------------------------------------------------------------------------------

    async def come_up(self) -> Ready:
        """Wait until the model is loaded, and the adapters of the settings are looked at.

        Raises:
            EngineGoneError: The ranks ended first.
        """
        ready = await self.client.ready()
        self.refuse(ready.refused)
        for name, card in self.adapters.items():
            card.invocation_tokens = ready.invocation_tokens.get(name)
        # Now, rather than with the first request that needs it: reading it holds up the others.
        with suppress(ConfigError):
            self.client.teach(self.tokenizer.vocabulary)
        return ready

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Serve some adapters of the settings no longer, and say so."""
        for name, reason in reasons.items():
            self.adapters.pop(name, None)
            self.refused[name] = reason
            told = {"adapter": name, "reason": reason}
            logger.warning("adapter %r is refused: %s", name, reason, extra=told)

    def give_text(self, card: AdapterCard) -> str | None:
        """Let an adapter use the tokenizer and the chat template that it brings along, if it may.

        Returns:
            What is not used though it differs from the base model's, in a sentence.

        Raises:
            ConfigError: What it brings along can't be read.
        """
        own = own_text(card.path, Path(self.settings.model))
        if not own:
            return None
        if self.settings.adapter_tokenizers:
            card.tokenizer = self.tokenizer.with_own(card.path, own)
            return None
        note = (
            f"The {' and '.join(own)} beside adapter {card.name!r} differ from the base model's, "
            "which are used; adapter_tokenizers=true uses the adapter's"
        )
        logger.warning(note, extra={"adapter": card.name})
        return note

    def tokenizer_of(self, adapter: str | None) -> Tokenizer:
        """The tokenizer and chat template of requests for an adapter; None is the base model."""
        card = self.adapters.get(adapter or "")
        return self.tokenizer if card is None or card.tokenizer is None else card.tokenizer

    def written_by(self, tokenizer: Tokenizer) -> Written:
        """What a tokenizer's chat template makes of tools and calls."""
        if tokenizer not in self._written:
            self._written[tokenizer] = look_at(tokenizer, self.settings.tool_call_parser)
        return self._written[tokenizer]

    # --- keys ----------------------------------------------------------------------------------

    def authorize(self, request: Request) -> ApiKey | None:
        """Whose request this is.

        Returns:
            The key that it carries; None where no key is asked for, or for the admin's.

        Raises:
            APIError: Status 401; keys are asked for, and this is none.
        """
        settings = self.settings
        if not settings.api_keys:
            return None
        sent = _bearer(request)
        if settings.admin_key is not None and _same(sent, settings.admin_key):
            return None
        # All are compared, so that the time tells nothing.
        found = [key for key in settings.api_keys if _same(sent, key.key)]
        if not found:
            raise APIError(
                401,
                "this server wants an API key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]

    def authorize_admin(self, request: Request) -> None:
        """See that a request may change what the server does.

        Raises:
            APIError: Status 401 or 403.
        """
        settings = self.settings
        if settings.admin_key is None:
            if settings.api_keys:
                raise APIError(403, "this server has no admin_key, so this is off")
            return
        if not _same(_bearer(request), settings.admin_key):
            raise APIError(
                401,
                "this wants the admin key: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    # --- models --------------------------------------------------------------------------------

    def allowed(self, key: ApiKey | None) -> list[str]:
        """The models that a key may use, the base model first."""
        names = [self.base_name, *self.adapters]
        if key is None or key.models is None:
            return names
        return [name for name in names if name in key.models]

    def refused_for(self, key: ApiKey | None) -> dict[str, str]:
        """The refused adapters that a key could use, with the reasons."""
        models = self.refused if key is None or key.models is None else key.models
        return {name: why for name, why in self.refused.items() if name in models}

    def resolve(self, model: str, key: ApiKey | None) -> str | None:
        """The adapter that a request's ``model`` means.

        Returns:
            The adapter's name; None for the base model.

        Raises:
            APIError: Status 404; there is no such model, or not for this key.
        """
        asked = ASKED.get()
        if asked is not None:
            asked.model = model
        if model not in self.allowed(key):
            why = self.refused_for(key).get(model)
            raise APIError(
                404,
                f"the model {model!r} does not exist, or this key may not use it"
                if why is None
                else f"adapter {model!r} was refused when the server started: {why}",
                code="model_not_found",
                param="model",
            )
        return None if model == self.base_name else model

    # --- limits --------------------------------------------------------------------------------

    def make_room(self, adapter: str | None, count: int) -> None:
        """See that so many more answers may be begun.

        Raises:
            APIError: Status 429 or 503.
        """
        if self.draining or not self.client.is_ready:
            what = "is being stopped" if self.draining else "is not ready yet"
            raise APIError(503, f"the server {what}; try again later", headers={"Retry-After": "5"})
        settings, open_ = self.settings, self.open_answers
        most = settings.max_num_seqs + settings.max_queue
        if count > most:
            raise APIError(
                400, f"{count} answers at once, and this server takes {most}; send fewer"
            )
        full = open_.total() + count > most
        limit = settings.max_queue_per_adapter
        if limit is not None and adapter is not None:
            full |= open_[adapter] + count > limit
        if full:
            self.metrics.rejected.labels(adapter or self.base_name).inc()
            raise APIError(
                429,
                f"too many requests ({open_.total()} are waiting or running); try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )


def _bearer(request: Request) -> str:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else ""


def _same(sent: str, wanted: str) -> bool:
    return hmac.compare_digest(sent.encode(), wanted.encode())
