"""The demo's two texts as JSONL: Shakespeare's speeches and Python's reference, as chats."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from examples.demo.base import prepare_base
from examples.demo.texts import Example, python_reference, shakespeare

_HELD_OUT = 16


def main() -> None:
    """Write the base model and the data that the configs beside this file name."""
    parser = argparse.ArgumentParser(prog="python -m examples.train.data", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, default=Path(".demo"))
    parser.add_argument("--examples", type=int, default=2000, help="at most so many of each text")
    args = parser.parse_args()
    print(prepare_base(args.cache_dir))
    for name, texts in (("shakespeare", shakespeare()), ("python", python_reference())):
        for path in write_chats(texts, args.cache_dir / "data" / name, at_most=args.examples):
            print(path)


def write_chats(texts: Sequence[Example], folder: Path, *, at_most: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl``, one chat a line.

    Args:
        texts: What is asked and answered.
        folder: Where to; made if need be.
        at_most: How many to take, chosen by chance.

    Returns:
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = random.Random(0).sample(list(texts), min(at_most, len(texts)))
    parts = {"train": chosen[_HELD_OUT:], "validation": chosen[:_HELD_OUT]}
    paths = []
    for name, part in parts.items():
        paths.append(folder / f"{name}.jsonl")
        lines = [json.dumps({"messages": _messages(example)}) + "\n" for example in part]
        paths[-1].write_text("".join(lines), "utf-8")
    return paths[0], paths[1]


def _messages(example: Example) -> list[dict[str, str]]:
    return [
        # The template's own system prompt would be a third of what is learnt.
        {"role": "system", "content": ""},
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.answer},
    ]


if __name__ == "__main__":
    main()
