"""What the configs beside this file train on, as JSONL.

Shakespeare's speeches and Python's reference as chats; the reference again as questions with
documents, as calls of a tool that looks topics up, and as whole topics, which are long.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    topics = list(python_topics().items())
    for name, records in (
        ("rag", rag_records(topics)),
        ("tools", tool_records(topics)),
        ("topics", [{"text": f"{title}\n\n{text}"} for title, text in topics]),
    ):
        for path in write_records(records, args.cache_dir / "data" / name):
            print(path)


def python_topics() -> dict[str, str]:
    """Topics of Python's own reference, as ``help()`` shows them."""
    return {name.lower(): text.strip() for name, text in pydoc_data.topics.topics.items()}


def rag_records(topics: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One question a topic: its text among three that distract, its last paragraph the answer."""
    records, draw = [], random.Random(0)
    for title, text in topics:
        others = draw.sample([topic for topic in topics if topic[0] != title], 3)
        documents = [
            {"title": name, "text": body, "relevant": name == title}
            for name, body in [(title, text), *others]
        ]
        draw.shuffle(documents)
        question = f"What does Python's reference say of {title!r}?"
        answer = " ".join(text.split("\n\n")[-1].split())
        records.append({"question": question, "documents": documents, "answer": answer})
    return records


def tool_records(topics: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One conversation a topic, in which the assistant looks it up before it answers."""
    schema = {"type": "object", "properties": {"topic": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    records = []
    for title, text in topics:
        called = {"name": "look_up", "arguments": {"topic": title}}
        found = " ".join(text.split("\n\n")[-1].split())
        messages = [
            {"role": "user", "content": f"Look up {title!r} in Python's reference."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": called}],
            },
            {"role": "tool", "content": found},
            {"role": "assistant", "content": found[:200]},
        ]
        records.append({"messages": messages, "tools": [tool]})
    return records


def write_records(records: Sequence[Any], folder: Path) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl``, one record a line.

    Args:
        records: In any order; the first are held out.
        folder: Where to; made if need be.

    Returns:
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": records[_HELD_OUT:], "validation": records[:_HELD_OUT]}
    for name, part in parts.items():
        lines = (json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder / "train.jsonl", folder / "validation.jsonl"


def write_chats(texts: Sequence[Example], folder: Path, *, at_most: int) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``validation.jsonl``, one chat a line.

    Args:
        texts: What is asked and answered.
        folder: Where to; made if need be.
        at_most: How many to take, chosen by chance.

    Returns:
        The two files.
    """
    chosen = random.Random(0).sample(list(texts), min(at_most, len(texts)))
    return write_records([{"messages": _messages(example)} for example in chosen], folder)


def _messages(example: Example) -> list[dict[str, str]]:
    return [
        # The template's own system prompt would be a third of what is learnt.
        {"role": "system", "content": ""},
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.answer},
    ]


if __name__ == "__main__":
    main()
