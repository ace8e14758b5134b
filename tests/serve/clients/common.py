"""What the clients' runs share: a task as JSON, and what came of it as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


@dataclass
class Task:
    """A running server, and what to ask it.

    Attributes:
        url: The server's, with ``/v1``.
        key: A key for all models.
        few: A key for the first of ``models`` only.
        models: The names to ask, each for every prompt.
        prompts: Texts.
        long: A prompt that no model here has room for.
        tokens: The length of each answer.
        spaces: Tokens that a model writes for ever, if it knows nothing and may.
    """

    url: str
    key: str
    few: str
    models: list[str]
    prompts: list[str]
    long: str
    tokens: int
    spaces: list[int]

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Each model with each prompt; neighbours differ in their model."""
        return [(model, prompt) for prompt in self.prompts for model in self.models]


def chat(prompt: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": prompt}]


class Place(BaseModel):
    """Where."""

    model_config = ConfigDict(extra="forbid")

    x: Literal[1, 2, 3]


class Go(BaseModel):
    """Go there."""

    model_config = ConfigDict(extra="forbid")

    to: Place
    fast: bool


def error_of(ask: Callable[[], Any]) -> str:
    """The class of the error that asking for something brings."""
    try:
        answer = ask()
    except Exception as error:
        return type(error).__name__
    return f"no error: {answer}"


def run(ask: Callable[[Task], dict[str, Any]]) -> None:
    """``python -m ... TASK OUTPUT``: two JSON files, since clients print what they like."""
    task, output = map(Path, sys.argv[1:])
    output.write_text(json.dumps(ask(Task(**json.loads(task.read_text())))))
