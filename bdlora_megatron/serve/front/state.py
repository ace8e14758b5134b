"""What all requests share: settings, the engine, models, keys, limits."""

from __future__ import annotations

import hmac
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request

from bdlora_megatron.serve.files import Fingerprint
from bdlora_megatron.serve.front.client import EngineClient
from bdlora_megatron.serve.front.errors import APIError
from bdlora_megatron.serve.front.metrics import Metrics
from bdlora_megatron.serve.front.text import Tokenizer
from bdlora_megatron.serve.settings import ApiKey, ServeSettings

__all__ = ["AdapterCard", "Front"]


@dataclass(slots=True)
class AdapterCard:
    """An adapter as clients see it.

    Attributes:
        name: What requests call it.
        path: Its folder.
        version: Counted from 1 each time that it is loaded.
        created: When it was loaded last, in seconds since 1970.
        files: What its files were like then.
    """

    name: str
    path: Path
    version: int = 1
    created: int = field(default_factory=lambda: int(time.time()))
    files: Fingerprint = field(default_factory=dict)


class Front:
    """The state of the front.

    Attributes:
        base_name: What requests call the base model.
        adapters: By name, those that new requests may use.
        changing: Names that are being loaded or unloaded.
        draining: No further requests are taken.
        open_answers: Answers that clients have not had to their end, by adapter; None stands for
            the base model. What the engine has finished and a slow client has not read is one.
    """

    def __init__(self, settings: ServeSettings, tokenizer: Tokenizer) -> None:
        """Start with the adapters of the settings.

        Args:
            settings: The server's.
            tokenizer: The model's.
        """
        self.settings = settings
        # Once: where no name is set, it is found by resolving a path.
        self.base_name = settings.base_name
        self.tokenizer = tokenizer
        self.client = EngineClient()
        self.metrics = Metrics(self.client, self.base_name)
        self.started = int(time.time())
        self.draining = False
        self.open_answers: Counter[str | None] = Counter()
        self.adapters = {
            name: AdapterCard(name, Path(path)) for name, path in settings.adapters.items()
        }
        self.changing: set[str] = set()

    # --- keys ----------------------------------------------------------------------------------

    def authorize(self, request: Request) -> ApiKey | None:
        """Whose request this is.

        Args:
            request: The request.

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

        Args:
            request: The request.

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

    def resolve(self, model: str, key: ApiKey | None) -> str | None:
        """The adapter that a request's ``model`` means.

        Args:
            model: What was sent.
            key: Whose request it is.

        Returns:
            The adapter's name; None for the base model.

        Raises:
            APIError: Status 404; there is no such model, or not for this key.
        """
        if model not in self.allowed(key):
            raise APIError(
                404,
                f"the model {model!r} does not exist, or this key may not use it",
                code="model_not_found",
                param="model",
            )
        return None if model == self.base_name else model

    # --- limits --------------------------------------------------------------------------------

    def make_room(self, adapter: str | None, count: int) -> None:
        """See that so many more answers may be begun.

        Args:
            adapter: For which.
            count: How many.

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
