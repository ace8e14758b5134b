"""What has been converted already: records beside the results, and whether they still hold.

`OUT/.bdlora/NAME.json` says what `OUT/NAME` was made from. It is written before the conversion
starts (as unfinished) and again after it, so that after a kill it is known whose a folder is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from bdlora_megatron.convert.folders import held_alone
from bdlora_megatron.convert.peft.config import CONFIG_NAME
from bdlora_megatron.convert.peft.tensors import PICKLE_NAME, SAFETENSORS_NAME
from bdlora_megatron.convert.pipeline import companions
from bdlora_megatron.convert.registry import detect_format
from bdlora_megatron.convert.slora.format import adapter_name
from bdlora_megatron.errors import AdapterFormatError

__all__ = ["RECORDS", "Record", "content_hash", "locked", "read_record", "write_record"]

RECORDS = ".bdlora"
_CHUNK = 1 << 20
# A training checkpoint keeps its optimizer beside the adapter; it is not read and need not be.
_PEFT_FILES = (CONFIG_NAME, SAFETENSORS_NAME, PICKLE_NAME)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a folder was made from.

    Attributes:
        source: Hash of the files it was made from; None while unfinished.
        request: Everything that was asked for, as JSON takes it.
        files: Size and time of change of every file made, by its path in the folder.
        summary: What the conversion reported.
    """

    source: str | None
    request: Any = None
    files: Any = None
    summary: Any = None

    def holds_for(self, target: Path) -> bool:
        """Whether the folder is there, as it was made.

        Returns:
            True if no file of it has changed since.
        """
        return self.source is not None and self.files == listing(target)


def content_hash(folder: Path, *, stop: Event | None = None) -> str:
    """Hash the names, sizes and contents of the files that an adapter is read from.

    Args:
        folder: The adapter's folder.
        stop: Set by another thread when the hash is not wanted any more; what is returned then
            means nothing.

    Raises:
        AdapterFormatError: If the folder is no adapter.
    """
    kind = detect_format(folder)
    if kind == "slora" and not folder.exists():
        # One of the numbered names of an adapter.
        folder = folder.with_name(adapter_name(folder))
    if kind == "peft":
        files = [folder / name for name in _PEFT_FILES if (folder / name).is_file()]
        files += companions(folder)
    else:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in files:
        own = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(_CHUNK)
            while (count := file.readinto(buffer)) and not (stop and stop.is_set()):
                own.update(memoryview(buffer)[:count])
        total.update(f"{path.relative_to(folder)}\0{own.hexdigest()}\n".encode())
    if not files:
        raise AdapterFormatError(f"{folder} holds no files of an adapter")
    return total.hexdigest()


def listing(folder: Path) -> dict[str, list[int]] | None:
    """Size and time of change of every file.

    Returns:
        Both by the path in the folder; None if there is no folder.
    """
    if not folder.is_dir():
        return None
    stats = {
        str(path.relative_to(folder)): path.stat()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_record(out: Path, name: str) -> Record | None:
    """The record of a result, if there is a readable one.

    Returns:
        The record; None also where a file is there that is none.
    """
    try:
        raw = json.loads(_path(out, name).read_text("utf-8"))
        return Record(**raw)
    except (OSError, ValueError, TypeError):
        return None


def write_record(out: Path, name: str, record: Record | None) -> None:
    """Replace a result's record at once.

    Args:
        out: The folder of all results.
        name: The result's.
        record: What it was made from; None takes the record away.
    """
    path = _path(out, name)
    if record is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({field: getattr(record, field) for field in Record.__slots__})
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other conversions out of a folder; the lock ends with the process.

    Args:
        out: The folder of all results; made if missing.

    Raises:
        ConfigError: If another conversion writes there.
    """
    folder = out / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    lock.touch()
    refusal = f"another conversion writes into {out}; wait for it or pass another --out"
    with held_alone(lock, refusal):
        yield


def _path(out: Path, name: str) -> Path:
    return out / RECORDS / f"{name}.json"
