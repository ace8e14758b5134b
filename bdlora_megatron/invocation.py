"""Activated LoRA: an adapter that acts from its invocation tokens on, as PEFT's aLoRA does.

Before them the base model's weights act, so that keys and values there are the base model's own.
Plain Python, for the API server too.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["active_from"]


def active_from(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where an adapter begins to act.

    Args:
        tokens: What is given to the model: a prompt, or a training example.
        invocation: The adapter's invocation tokens, at least one.

    Returns:
        The place of the first token of their last occurrence; None where they do not occur, and
        the base model alone acts.
    """
    wanted, length = tuple(invocation), len(invocation)
    for start in range(len(tokens) - length, -1, -1):
        if tokens[start] == wanted[0] and tuple(tokens[start : start + length]) == wanted:
            return start
    return None
