"""JSONL lines as tokens, with a mark on those that are to be learnt.

| format | a line |
|---|---|
| `chat` | `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}`, or \
ShareGPT's `{"conversations": [{"from": "human", "value": ...}, ...]}` |
| `prompt_completion` | `{"prompt": ..., "completion": ...}`, text or messages; or NeMo's `input` \
and `output` |
| `text` | `{"text": ...}` |

Loss counts on what the assistant says, on completions, and on all of a plain text.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdlora_megatron.errors import ConfigError, MissingDependencyError
from bdlora_megatron.train.chats import ChatEncoder, ChatOptions, Encoder, Marked
from bdlora_megatron.train.lines import BadLineError, Keys, read_chat, read_pair, read_record

__all__ = ["Example", "Format", "TooLong", "load_tokenizer", "read_examples"]

Format = Literal["chat", "prompt_completion", "text"]
TooLong = Literal["error", "truncate", "drop"]

_SHOWN = 8
logger = logging.getLogger(__name__)


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
            "tokenizing needs transformers; pip install 'bdlora-megatron[train]'"
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


def read_examples(
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    format: Format,
    seq_length: int,
    too_long: TooLong = "error",
    vocab_size: int | None = None,
    chats: ChatOptions | None = None,
) -> list[Example]:
    """Read and tokenize every line of some JSONL files.

    Args:
        paths: The files, in order.
        tokenizer: From ``load_tokenizer``.
        format: What a line holds.
        seq_length: Positions in a row.
        too_long: What becomes of a longer example. Plain text is cut into rows instead.
        vocab_size: Rows of the base model's embedding, within which every token has to be.
        chats: How conversations are read.

    Returns:
        The examples, in the order of the lines.

    Raises:
        ConfigError: A file or line is not what ``format`` says, is too long, or has nothing to
            learn; the first bad lines are listed.
    """
    chats = chats or ChatOptions()
    keys = Keys(chats.ignore_keys)
    documents = _Documents(tokenizer, chats, keys).of(format)
    fit: Callable[[Example, int], list[Example]] = _cut if format == "text" else _FITS[too_long]
    examples: list[Example] = []
    problems: list[str] = []
    silent = dropped = 0
    for where, line in _lines(paths):
        try:
            made = [_example(marked) for marked in documents(read_record(line, keys))]
            for example in made:
                _check_vocabulary(example, vocab_size, tokenizer)
            fitted = [part for example in made for part in fit(example, seq_length)]
        except BadLineError as error:
            problems.append(f"{where}: {error}")
        else:
            examples += fitted
            silent += not made
            dropped += bool(made) and not fitted
    if problems:
        more = f"\n- and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "".join(f"\n- {problem}" for problem in problems[:_SHOWN])
        raise ConfigError(f"{len(problems)} line(s) of format {format!r} are refused:{lines}{more}")
    for note, count in keys.notes.items():
        logger.warning("%s: %s (%d times)", ", ".join(map(str, paths)), note, count)
    kept = [example for example in examples if example.learnt[1:].any()]
    if paths and not kept:
        raise ConfigError(f"{', '.join(map(str, paths))} hold no example with a token to learn")
    silent += len(examples) - len(kept)
    if dropped or silent:
        logger.warning(
            "%d examples are empty or longer than model.seq_length=%d and dropped; %d have nothing "
            "to learn within it and are left out; %d are left",
            dropped,
            seq_length,
            silent,
            len(kept),
        )
    return kept


def _lines(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        text = _decode(path)
        # Not splitlines(): JSON strings may hold other line breaks, such as U+2028.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path} line {number}", line


def _decode(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: The file can't be read or is in another encoding.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a JSONL file") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(
            f"{path} is not UTF-8 text but UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {line} is not UTF-8 text: {error}") from error


def _example(marked: Marked) -> Example:
    return Example(np.array(marked[0], dtype=np.int32), np.array(marked[1], dtype=np.bool_))


def _check_vocabulary(example: Example, vocab_size: int | None, tokenizer: Any) -> None:
    largest = int(example.tokens.max(initial=0))
    if vocab_size is not None and largest >= vocab_size:
        raise BadLineError(
            f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is not among the "
            f"{vocab_size} of the base model's embedding; use the tokenizer that belongs to the "
            "base, or a base whose embedding was resized for it"
        )


def _part(example: Example, start: int, positions: int) -> Example:
    stop = start + positions + 1
    return Example(example.tokens[start:stop], example.learnt[start:stop])


def _cut(example: Example, seq_length: int) -> list[Example]:
    """Pieces of a text; neighbours share the token that one predicts and the other starts from."""
    return [_part(example, start, seq_length) for start in range(0, len(example), seq_length)]


def _refuse_long(example: Example, seq_length: int) -> list[Example]:
    if len(example) > seq_length:
        raise BadLineError(
            f"{len(example)} positions, over model.seq_length={seq_length}; raise it, or set "
            "dataset.too_long to truncate or drop"
        )
    return [example]


_FITS: dict[str, Callable[[Example, int], list[Example]]] = {
    "error": _refuse_long,
    "truncate": lambda example, seq_length: [_part(example, 0, seq_length)],
    "drop": lambda example, seq_length: [example] if len(example) <= seq_length else [],
}


class _Documents:
    """From a line's object to documents, for each format."""

    def __init__(self, tokenizer: Any, options: ChatOptions, keys: Keys) -> None:
        self._tokenizer, self._keys = tokenizer, keys
        self._encoder = Encoder(tokenizer)
        self._chats = ChatEncoder(self._encoder, options, keys)
        self._chat_settings = options.train_on != "all" or bool(options.template_kwargs)

    def of(self, format: Format) -> Callable[[Mapping[str, Any]], list[Marked]]:
        formats: dict[Format, Callable[[Mapping[str, Any]], list[Marked]]] = {
            "chat": lambda record: self._chats.documents(read_chat(record, self._keys)),
            "prompt_completion": self._pair,
            "text": self._text,
        }
        return formats[format]

    def _text(self, record: Mapping[str, Any]) -> list[Marked]:
        if not isinstance(record.get("text"), str):
            raise BadLineError(f"wanted text under 'text'; found {list(record)}")
        self._keys.rest_of_line(record, ("text",))
        ids = [*self._whole(record["text"]), self._tokenizer.eos_token_id]
        return [(ids, [True] * len(ids))]

    def _pair(self, record: Mapping[str, Any]) -> list[Marked]:
        pair = read_pair(record, self._keys)
        if not isinstance(pair, tuple):
            return self._chats.documents(pair)
        if self._chat_settings:
            self._keys.notes[
                "a prompt of plain text is no conversation, so dataset.train_on and "
                "chat_template_kwargs are not used"
            ] += 1
        prompt, whole = self._whole(pair[0]), self._whole(pair[0] + pair[1])
        answer = [*self._encoder.after(prompt, whole, pair[1]), self._tokenizer.eos_token_id]
        return [(prompt + answer, [False] * len(prompt) + [True] * len(answer))]

    def _whole(self, text: str) -> list[int]:
        """Tokens of what begins a sequence, without the token that ends one."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        # Some tokenizers add it by themselves; it comes once, at the end.
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids
