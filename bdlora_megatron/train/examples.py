"""JSONL lines as tokens, with a mark on those that are to be learnt.

| format | a line |
|---|---|
| `chat` | `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}, ...]}` |
| `prompt_completion` | `{"prompt": ..., "completion": ...}` |
| `text` | `{"text": ...}` |

Loss counts on what the assistant says, on completions, and on all of a plain text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdlora_megatron.errors import ConfigError, MissingDependencyError

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


#: What tells tokens to learn from others: pieces of one document, in order.
_Pieces = list[tuple[list[int], bool]]


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
) -> list[Example]:
    """Read and tokenize every line of some JSONL files.

    Args:
        paths: The files, in order.
        tokenizer: From ``load_tokenizer``.
        format: What a line holds.
        seq_length: Positions in a row.
        too_long: What becomes of a longer example. Plain text is cut into rows instead.

    Returns:
        The examples, in the order of the lines.

    Raises:
        ConfigError: A file or line is not what ``format`` says, is too long, or has nothing to
            learn; the first bad lines are listed.
    """
    encode = _ENCODERS[format]
    fit: Callable[[Example, int], list[Example]] = _cut if format == "text" else _FITS[too_long]
    examples: list[Example] = []
    problems: list[str] = []
    dropped = 0
    for where, line in _lines(paths):
        try:
            fitted = fit(_example(encode(json.loads(line), tokenizer)), seq_length)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error}")
        except _BadLineError as error:
            problems.append(f"{where}: {error}")
        else:
            examples += fitted
            dropped += not fitted
    if problems:
        more = f"\n- and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        lines = "".join(f"\n- {problem}" for problem in problems[:_SHOWN])
        raise ConfigError(f"{len(problems)} line(s) of format {format!r} are refused:{lines}{more}")
    kept = [example for example in examples if example.learnt[1:].any()]
    if paths and not kept:
        raise ConfigError(f"{', '.join(map(str, paths))} hold no example with a token to learn")
    if dropped or len(kept) < len(examples):
        logger.warning(
            "%d examples are empty or longer than model.seq_length=%d and dropped; %d have nothing "
            "to learn within it and are left out; %d are left",
            dropped,
            seq_length,
            len(examples) - len(kept),
            len(kept),
        )
    return kept


class _BadLineError(Exception):
    """What is wrong with one line."""


def _lines(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; name a JSONL file") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
        # Not splitlines(): JSON strings may hold other line breaks, such as U+2028.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path} line {number}", line


def _example(pieces: _Pieces) -> Example:
    tokens = [token for ids, _ in pieces for token in ids]
    learnt = [flag for ids, flag in pieces for _ in ids]
    return Example(np.array(tokens, dtype=np.int32), np.array(learnt, dtype=np.bool_))


def _part(example: Example, start: int, positions: int) -> Example:
    stop = start + positions + 1
    return Example(example.tokens[start:stop], example.learnt[start:stop])


def _cut(example: Example, seq_length: int) -> list[Example]:
    """Pieces of a text; neighbours share the token that one predicts and the other starts from."""
    return [_part(example, start, seq_length) for start in range(0, len(example), seq_length)]


def _refuse_long(example: Example, seq_length: int) -> list[Example]:
    if len(example) > seq_length:
        raise _BadLineError(
            f"{len(example)} positions, over model.seq_length={seq_length}; raise it, or set "
            "dataset.too_long to truncate or drop"
        )
    return [example]


_FITS: dict[str, Callable[[Example, int], list[Example]]] = {
    "error": _refuse_long,
    "truncate": lambda example, seq_length: [_part(example, 0, seq_length)],
    "drop": lambda example, seq_length: [example] if len(example) <= seq_length else [],
}


def _field(record: Any, name: str) -> str:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, str):
        found = list(record) if isinstance(record, dict) else type(record).__name__
        raise _BadLineError(f"wanted text under {name!r}; found {found}")
    return value


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _text(record: Any, tokenizer: Any) -> _Pieces:
    ids = _encode(tokenizer, _field(record, "text"), special=True)
    return [([*_without_eos(ids, tokenizer), tokenizer.eos_token_id], True)]


def _prompt_completion(record: Any, tokenizer: Any) -> _Pieces:
    prompt = _encode(tokenizer, _field(record, "prompt"), special=True)
    completion = _encode(tokenizer, _field(record, "completion"), special=False)
    return [
        (_without_eos(prompt, tokenizer), False),
        ([*completion, tokenizer.eos_token_id], True),
    ]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    # Some tokenizers add it by themselves; it comes once, at the end.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _chat(record: Any, tokenizer: Any) -> _Pieces:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise _BadLineError('wanted {"messages": [{"role": ..., "content": ...}, ...]}')
    texts = [("", False)]
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:index], add_generation_prompt=True)
            texts += [(before, False), (_render(tokenizer, messages[: index + 1]), True)]
    if len(texts) == 1:
        raise _BadLineError("no message has the role 'assistant', so there is nothing to learn")
    pieces = []
    for (before, _), (text, flag) in pairwise(texts):
        if not text.startswith(before):
            raise _BadLineError(
                "the chat template writes earlier turns differently once a later one follows, so "
                "the answers can't be told from the rest; give one line for each answer"
            )
        # Piece by piece, as when serving: there the prompt ends where the answer will begin.
        pieces.append((_encode(tokenizer, text[len(before) :], special=False), flag))
    return pieces


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    if not messages:
        raise _BadLineError("the first message is the assistant's; wanted a user's before it")
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # Templates are programs of their own and raise what they like.
        raise _BadLineError(f"the chat template refuses it: {error}") from error
    return text


_ENCODERS: dict[str, Callable[[Any, Any], _Pieces]] = {
    "chat": _chat,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
