"""Telling whether an adapter's files are the ones that were seen before."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from bdlora_megatron.errors import AdapterFormatError

__all__ = ["Fingerprint", "fingerprint"]

#: Size and time of change of each file, by name.
Fingerprint: TypeAlias = dict[str, tuple[int, int]]


def fingerprint(folder: Path) -> Fingerprint:
    """What changes when an adapter's files do.

    Returns:
        Size and time of change of each file in it.

    Raises:
        AdapterFormatError: It is not a folder.
    """
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder} is not a folder; give the folder of an adapter")
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            stat = path.stat()
            found[path.name] = (stat.st_size, stat.st_mtime_ns)
    return found
