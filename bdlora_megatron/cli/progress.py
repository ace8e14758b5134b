"""How far a conversion is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from bdlora_megatron.cli import output
from bdlora_megatron.cli.jobs import JobResult

__all__ = ["progress"]


def progress(results: Iterable[JobResult], *, total: int) -> Iterator[JobResult]:
    """Show each result as it comes, on stderr."""
    if total > 1 and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(results, total=total, unit="adapter")
            return
    for number, result in enumerate(results, 1):
        if total > 1:
            output.note(f"[{number}/{total}] {result.name}: {result.status}")
        yield result
