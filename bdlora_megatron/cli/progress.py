"""How far a command is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from bdlora_megatron.cli import output

__all__ = ["progress"]

T = TypeVar("T")
#: Without a bar and without something to tell of each result, a line now and then.
_EVERY_S = 10.0


def progress(
    results: Iterable[T],
    *,
    total: int,
    unit: str = "adapter",
    told: Callable[[T], str] | None = None,
) -> Iterator[T]:
    """Show each result as it comes, on stderr.

    Args:
        results: Results.
        total: How many there will be.
        unit: What each is of.
        told: What to say of one where there is no bar; without it, how many there are is told
            every ten seconds.
    """
    if total > 1 and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(results, total=total, unit=unit)
            return
    last = time.monotonic()
    for number, result in enumerate(results, 1):
        if total > 1 and told is not None:
            output.note(f"[{number}/{total}] {told(result)}")
        elif total > 1 and time.monotonic() - last > _EVERY_S:
            last = time.monotonic()
            output.note(f"[{number}/{total}] {unit}s")
        yield result
