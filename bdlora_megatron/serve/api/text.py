"""From text to tokens, and from tokens to text as they come."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.config import stop_ids
from bdlora_megatron.serve.messages import Choice, FinishReason, Token, Vocabulary

__all__ = ["VOCABULARIES", "TextDelta", "TextStream", "Tokenizer", "chat_template"]

#: Files that hold a tokenizer, one of which is enough.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")

#: So many tokens of the prompt decide how the first token of the answer is spelt.
_CONTEXT = 6
_UNFINISHED = "\ufffd"
#: How sentencepiece's vocabularies write a byte down.
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """A Hugging Face model's tokenizer and chat template.

    Attributes:
        stop_ids: The tokens with which the model ends an answer.
    """

    def __init__(self, folder: str) -> None:
        """Read it from the model's folder; nothing is downloaded.

        Raises:
            ConfigError: There is no tokenizer in it.
        """
        self._tokenizer: Any = _read_tokenizer(folder)
        self._template = self._tools_template = ""
        self._vocabulary: Vocabulary | None = None
        # A token that stands for itself: decoders change what stands at the beginning of a text.
        self._before = self.encode("a", special=False)[-1:]
        self.stop_ids = stop_ids(Path(folder), self._tokenizer.eos_token_id)

    def with_own(self, folder: Path, own: Collection[str]) -> Tokenizer:
        """This one, with what an adapter brings along.

        Args:
            folder: The adapter's.
            own: Of ``chat template`` and ``tokenizer``, what to take from there.

        Returns:
            The adapter's. An answer ends at this one's ends, too.

        Raises:
            ConfigError: There is no such thing.
        """
        made = Tokenizer(str(folder)) if "tokenizer" in own else copy.copy(self)
        if "chat template" in own:
            made._template = made._tools_template = chat_template(folder)
        else:
            made._template, made._tools_template = self.template, self.tools_template
        made.stop_ids = self.stop_ids | made.stop_ids
        made._vocabulary = None
        return made

    @property
    def template(self) -> str:
        """How the model writes a conversation down, in Jinja; empty where it does not say."""
        if self._template or not self._tokenizer.chat_template:
            return self._template
        template: str = self._tokenizer.get_chat_template()
        return template

    @property
    def tools_template(self) -> str:
        """The same of a conversation with tools, for which some models have another template."""
        if self._tools_template or not self._tokenizer.chat_template:
            return self._tools_template
        template: str = self._tokenizer.get_chat_template(tools=[])
        return template

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text to a grammar."""
        return frozenset(
            token
            for token, added in self._tokenizer.added_tokens_decoder.items()
            # llguidance takes every added token of this shape as a special one.
            if added.special or re.fullmatch("<.*>", added.content, re.DOTALL)
        )

    def token_of(self, text: str) -> int | None:
        """The token that is spelt so, as a whole; None without one."""
        token: int | None = self._tokenizer.convert_tokens_to_ids(text)
        spelt = None if token is None else self._tokenizer.convert_ids_to_tokens(token)
        return token if spelt == text else None

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens, for grammars.

        Raises:
            ConfigError: They are not known as Hugging Face's fast tokenizers know them, or none
                of them ends an answer.
        """
        if self._vocabulary is None:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None or not self.stop_ids:
                what = "a fast tokenizer" if backend is None else "a token that ends an answer"
                raise ConfigError(f"grammars and tools want {what}, and this model has none")
            # Padding changes no token, and training leaves it behind.
            known = {**json.loads(backend.to_str()), "padding": None, "truncation": None}
            text = json.dumps(known)
            named = f"{sorted(self.stop_ids)} {text}".encode()
            key = hashlib.sha256(named).hexdigest()
            self._vocabulary = Vocabulary(key, text, self.stop_ids)
        return self._vocabulary

    def facts(self) -> dict[str, Any]:
        """Its class, its special tokens by their names, and the chat template, as vLLM has them."""
        return {
            "tokenizer_class": type(self._tokenizer).__name__,
            # Clients look for these two, also where a model has none.
            "bos_token": None,
            "eos_token": None,
            **self._tokenizer.special_tokens_map,
            "chat_template": self.template or None,
        }

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            special: With what the model puts before every text.

        Raises:
            ConfigError: The text is none: it holds half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the text holds half of a surrogate pair, {text[error.start]!a}, as its "
                f"character {error.start}; send whole characters"
            ) from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, special: bool = False, **how: Any
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Args:
            messages: As for ``write_chat``.
            special: As for ``encode``; templates write such tokens by themselves.
            how: As for ``write_chat``.

        Raises:
            ConfigError: As ``write_chat``.
        """
        return self.encode(self.write_chat(messages, **how), special=special)

    def write_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        continues: bool = False,
        prompts: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model reads it.

        Args:
            messages: ``role`` and ``content`` of each, and what else templates look at.
            tools: What the model may call, as OpenAI's API has it.
            continues: The answer goes on with the last message.
            prompts: Write what stands before an answer.
            variables: What else the template is told.

        Raises:
            ConfigError: The model has no chat template, or it refuses the conversation.
        """
        template = self.tools_template if tools else self.template
        if not template:
            raise ConfigError(
                "this model has no chat template; use /v1/completions, or put a chat_template "
                "into its tokenizer_config.json"
            )
        write = self._tokenizer.apply_chat_template
        taken = sorted(inspect.signature(write).parameters.keys() & (variables or {}).keys())
        if taken:
            raise ConfigError(f"chat_template_kwargs has {taken}, which no template is told")
        try:
            text: str = write(
                list(messages),
                # Templates take an empty list as one of tools.
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=prompts,
                continue_final_message=continues,
                tokenize=False,
                **(variables or {}),
            )
        except Exception as error:
            # Whatever a program that came with the model makes of what a client sent.
            raise ConfigError(f"the model's chat template refuses the messages: {error}") from error
        return text

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some tokens."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    def spell(self, token: int) -> str:
        """The text of one token within a text, also where that is a space and more, or special.

        Returns:
            The text; with U+FFFD for what is only a part of a character.
        """
        before = self.decode(self._before, special=True)
        text = self.decode([*self._before, token], special=True)
        return text.removeprefix(before) if text.startswith(before) else text

    def spell_bytes(self, token: int) -> bytes:
        """The bytes of one token, which for a part of a character are no text."""
        text = self.spell(token)
        if _UNFINISHED not in text:
            return text.encode()
        name: str = self._tokenizer.convert_ids_to_tokens(token)
        byte, letters = _BYTE.fullmatch(name), _byte_letters()
        if byte is not None:
            return bytes.fromhex(byte[1])
        if letters.keys() >= set(name):
            return bytes(letters[letter] for letter in name)
        return text.encode()


@cache
def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write bytes: visible characters stand for themselves."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def chat_template(folder: Path) -> str:
    """The chat template in a folder, as its files have it; empty where there is none.

    Raises:
        ConfigError: The file with it can't be read.
    """
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.is_file():
            return own.read_text()
        listed = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no chat template could be read from {folder}: {error}") from error
    if isinstance(listed, list):
        # Several, each with a name.
        listed = {one.get("name"): one.get("template") for one in listed}.get("default")
    return listed or ""


def _read_tokenizer(folder: str) -> Any:
    """Hugging Face's tokenizer.

    Its reader would import torch where that is installed: ten seconds and 600 MiB, of which
    tokenizers use nothing. A process that has torch already keeps it.

    Raises:
        ConfigError: There is none in the folder.
    """
    quiet, hidden = logging.root.manager.disable, "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
        # It advises to install torch.
        logging.disable(logging.WARNING)
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer could be read from {folder}: {error}; copy the model's tokenizer "
            "files there"
        ) from error
    finally:
        if hidden:
            del sys.modules["torch"]
            logging.disable(quiet)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that can be shown, and the tokens that have come since the last piece.

    Attributes:
        text: The text; empty at an end without any.
        choices: The tokens.
        finish: Why this is the last piece, if it is.
        prompt: In the first piece, if it was asked for: the prompt's tokens from the second on.
        cached: In the first piece: how many tokens of the prompt were in the prefix cache.
    """

    text: str
    choices: tuple[Choice, ...]
    finish: FinishReason | None = None
    prompt: tuple[Choice, ...] = ()
    cached: int = 0


class TextStream:
    """The text of one answer, as its tokens come.

    Text is held back while it may be half of a character or the beginning of a stop text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            tokenizer: The model's.
            prompt: The prompt's token ids.
            stop: Texts that end the answer and are cut off.
            min_tokens: A stop text that is whole after so many tokens or fewer ends nothing.
            shown: Special tokens that are shown, with their texts.
        """
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._stop = tuple(stop)
        self._early = min_tokens
        # Characters at the beginning of what is held in which no stop text may end.
        self._exempt = 0
        self._ids = list(prompt[-_CONTEXT:])
        # Tokens from _read on are not shown yet; they are spelt together with those from _begin.
        self._begin, self._read = 0, len(self._ids)
        self._held = ""
        self._choices: list[Choice] = []
        self._prompt: tuple[Choice, ...] = ()
        self._cached = 0

    def push(self, token: Token) -> TextDelta | None:
        """Take a token.

        Returns:
            What can be shown now; None if that is nothing. With a finish reason, the answer is
            over, also where the engine would go on.
        """
        if token.choice.token in self._shown:
            # What is torn before it stays so.
            self._held += self._new_text(last=True) + self._shown[token.choice.token]
        self._ids.append(token.choice.token)
        self._choices.append(token.choice)
        self._prompt += token.prompt
        self._cached += token.cached
        self._held += self._new_text(last=token.finish is not None)
        if self._early > 0:
            self._early, self._exempt = self._early - 1, len(self._held)
        at = self._stop_at()
        if at >= 0:
            return self._piece(self._held[:at], "stop")
        if token.finish is not None:
            return self._piece(self._held, token.finish)
        shown = self._held[: len(self._held) - self._undecided()]
        if not shown:
            return None
        return self._piece(shown, None)

    def _new_text(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        now = self._tokenizer.decode(self._ids[self._begin :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not last):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _stop_at(self) -> int:
        """Where the first stop text begins, of those that end where one may; -1 without one."""
        places = (self._held.find(t, max(self._exempt - len(t) + 1, 0)) for t in self._stop)
        return min((place for place in places if place >= 0), default=-1)

    def _undecided(self) -> int:
        """Characters at the end that may begin a stop text."""
        for length in range(min(max(map(len, self._stop), default=0), len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(text.startswith(end) and text != end for text in self._stop):
                return length
        return 0

    def _piece(self, text: str, finish: FinishReason | None) -> TextDelta:
        self._held = self._held[len(text) :]
        self._exempt = max(self._exempt - len(text), 0)
        choices, self._choices = tuple(self._choices), []
        prompt, self._prompt = self._prompt, ()
        cached, self._cached = self._cached, 0
        return TextDelta(text, choices, finish, prompt, cached)
