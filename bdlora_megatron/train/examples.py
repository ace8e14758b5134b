"""Records as tokens, with a mark on those that are to be learnt.

| format | a record |
|---|---|
| `chat` | `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}`, or \
ShareGPT's `{"conversations": [{"from": "human", "value": ...}, ...]}` |
| `prompt_completion` | `{"prompt": ..., "completion": ...}`, text or messages; or NeMo's `input` \
and `output` |
| `rag` | `{"question": ..., "documents": [...], "answer": ...}` |
| `text` | `{"text": ...}` |

Loss counts on what the assistant says, on completions, and on all of a plain text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.train.chats import ChatEncoder, ChatOptions, Encoder, Marked
from bdlora_megatron.train.lines import BadLineError, Keys, read_chat, read_pair, read_record
from bdlora_megatron.train.rag import RagOptions, RagReader

__all__ = ["Documents", "Example", "Format", "load_tokenizer"]

Format = Literal["chat", "prompt_completion", "rag", "text"]


@dataclass(frozen=True, slots=True)
class Example:
    """One document.

    Attributes:
        tokens: ``[n]``, int32.
        learnt: ``[n]``, bool: whether predicting this token counts in the loss.
    """

    tokens: NDArray[np.int32]
    learnt: NDArray[np.bool_]

    def __len__(self) -> int:
        """Positions in a row: every token but the last predicts the next one."""
        return max(len(self.tokens) - 1, 0)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a Hugging Face folder.

    Args:
        folder: The base model's folder. Nothing is downloaded.

    Returns:
        A ``transformers`` tokenizer.

    Raises:
        ConfigError: The folder holds none that can be read.
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizing needs transformers ({error}); pip install 'bdlora-megatron[train]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"no tokenizer can be read from {folder}: {error}; put the base model's tokenizer "
            "files there"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {folder} names no end-of-sequence token; set eos_token in its "
            "tokenizer_config.json, or a completion would never learn to end"
        )
    return tokenizer


class Documents:
    """From records to documents, with everything that decides what they are."""

    def __init__(
        self,
        tokenizer: Any,
        format: Format,
        *,
        vocab_size: int | None = None,
        chats: ChatOptions | None = None,
        rag: RagOptions | None = None,
    ) -> None:
        """Settle how records are read.

        Args:
            tokenizer: From ``load_tokenizer``.
            format: What a record holds.
            vocab_size: Rows of the base model's embedding, within which every token has to be.
            chats: How conversations are read.
            rag: How documents and questions are laid out.

        Raises:
            ConfigError: The chat template does not take the arguments of ``chats``.
        """
        self.tokenizer, self.format = tokenizer, format
        self.vocab_size, self.chats = vocab_size, chats or ChatOptions()
        self.rag = rag or RagOptions()
        self._keys, self._encoder = Keys(self.chats.ignore_keys), Encoder(tokenizer)
        self._encode = ChatEncoder(self._encoder, self.chats, self._keys)
        self._fit = RagReader(self.rag, self._keys, lambda text: len(self._encoder.ids(text)))
        self._read = {
            "chat": self._chat,
            "prompt_completion": self._pair,
            "rag": self._question,
            "text": self._text,
        }[format]

    def __reduce__(self) -> tuple[Any, ...]:
        """For processes that tokenize: what was given, and no caches."""
        made = partial(Documents, vocab_size=self.vocab_size, chats=self.chats, rag=self.rag)
        return made, (self.tokenizer, self.format)

    def settings(self) -> str:
        """What decides what documents are, but for the tokenizer."""
        return repr((self.format, self.vocab_size, self.chats, self.rag))

    def batch(self, records: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The documents of some records, column by column.

        Args:
            records: ``file``, ``line`` and ``record`` of each.

        Returns:
            One row for each document, or one that says that there is none, or why: ``file`` and
            ``line``; ``made``; ``tokens``; ``learnt``; ``first``, the first token but the very
            first that is learnt, or -1; ``problem``; ``notes`` on what was not read.
        """
        rows: list[dict[str, Any]] = []
        for file, line, record in zip(
            *(records[n] for n in ("file", "line", "record")), strict=True
        ):
            here = {"file": file, "line": line, "notes": [], "problem": None}
            nothing = {"made": False, "tokens": [], "learnt": [], "first": -1}
            self._keys.notes.clear()
            try:
                made = [
                    self._row(*marked) for marked in self._read(read_record(record, self._keys))
                ]
            except BadLineError as error:
                rows.append({**here, **nothing, "problem": str(error)})
                continue
            made = made or [nothing]
            made[0] = {**made[0], "notes": list(self._keys.notes.elements())}
            rows += [{**here, **row} for row in made]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def _row(self, tokens: list[int], learnt: list[bool]) -> dict[str, Any]:
        largest = max(tokens, default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise BadLineError(
                f"token {largest} ({self.tokenizer.convert_ids_to_tokens(largest)!r}) is not "
                f"among the {self.vocab_size} of the base model's embedding; use the tokenizer "
                "that belongs to the base, or a base whose embedding was resized for it"
            )
        first = next((place for place, yes in enumerate(learnt) if yes and place), -1)
        return {"made": True, "tokens": tokens, "learnt": learnt, "first": first}

    def _chat(self, record: Mapping[str, Any]) -> list[Marked]:
        return self._encode.documents(read_chat(record, self._keys))

    def _question(self, record: Mapping[str, Any]) -> list[Marked]:
        def length(prompt: str, answer: str) -> int:
            (tokens, _), *_ = self._answered(prompt, answer)
            return len(tokens) - 1

        return self._answered(*self._fit.fitted(record, length))

    def _answered(self, prompt: str, answer: str) -> list[Marked]:
        """A prompt and its answer: as a conversation, where the tokenizer has a chat template."""
        if self.tokenizer.chat_template is None:
            return self._pair({"prompt": prompt, "completion": answer})
        said = {"user": prompt, "assistant": answer}
        messages = [{"role": role, "content": content} for role, content in said.items()]
        return self._chat({"messages": messages})

    def _text(self, record: Mapping[str, Any]) -> list[Marked]:
        if not isinstance(record.get("text"), str):
            raise BadLineError(f"wanted text under 'text'; found {list(record)}")
        self._keys.rest_of_line(record, ("text",))
        ids = [*self._whole(record["text"]), self.tokenizer.eos_token_id]
        return [(ids, [True] * len(ids))]

    def _pair(self, record: Mapping[str, Any]) -> list[Marked]:
        pair = read_pair(record, self._keys)
        if not isinstance(pair, tuple):
            return self._encode.documents(pair)
        if self.chats.train_on != "all" or self.chats.template_kwargs:
            self._keys.notes[
                "a prompt of plain text is no conversation, so dataset.train_on and "
                "chat_template_kwargs are not used"
            ] += 1
        prompt, whole = self._whole(pair[0]), self._whole(pair[0] + pair[1])
        answer = [*self._encoder.after(prompt, whole, pair[1]), self.tokenizer.eos_token_id]
        return [(prompt + answer, [False] * len(prompt) + [True] * len(answer))]

    def _whole(self, text: str) -> list[int]:
        """Tokens of what begins a sequence, without the token that ends one."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        # Some tokenizers add it by themselves; it comes once, at the end.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
