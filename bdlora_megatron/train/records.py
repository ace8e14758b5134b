"""Training data's files as records: JSONL, JSON, CSV, Parquet and Arrow, one record at a time."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bdlora_megatron.errors import ConfigError

__all__ = ["records"]


def records(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every record of some files.

    Args:
        paths: The files, in order; their suffixes say what they are, and anything unknown is JSONL.

    Yields:
        ``file``, its place in ``paths``; ``line``, counted from 1 (rows of a table); ``record``,
        JSON text, not yet read.

    Raises:
        ConfigError: A file cannot be read.
    """
    for number, path in enumerate(paths):
        read = _READERS.get(Path(path).suffix.lower(), _lines)
        try:
            for line, record in read(path):
                yield {"file": number, "line": line, "record": record}
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot read {path}: {reason}; name a JSONL file") from error


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines of UTF-8 text, with or without a byte order mark, that are not blank.

    Raises:
        ConfigError: It is in another encoding.
    """
    # By bytes: JSON strings may hold what a text file would take for a line's end, such as U+2028.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ConfigError(
                    f"{path} is not UTF-8 text but UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} line {number} is not UTF-8 text: {error}") from error
            if text.strip():
                yield number, text.rstrip("\n")


def _json(path: str) -> Iterator[tuple[int, str]]:
    """The objects of a JSON list; a file of JSON lines under this name is read as such.

    Raises:
        ConfigError: It is not JSON.
    """
    with open(path, "rb") as file:
        is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    if not is_list:
        yield from _lines(path)
        return
    try:
        items = json.loads(Path(path).read_text("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    for number, item in enumerate(items, 1):
        yield number, json.dumps(item)


def _csv(path: str) -> Iterator[tuple[int, str]]:
    """Rows under a header; every value is text."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            yield number, json.dumps(row)


def _parquet(path: str) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(1000))


def _arrow(path: str) -> Iterator[tuple[int, str]]:
    """A file or a stream of Arrow's; ``datasets`` writes streams."""
    import pyarrow as pa

    with pa.memory_map(path) as source:
        try:
            batches = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        yield from _rows(batches)


def _rows(batches: Any) -> Iterator[tuple[int, str]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, json.dumps(_without_nulls(row), default=str)


def _without_nulls(value: Any) -> Any:
    """The value without keys that only other rows have: Arrow fills them with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Callable[[str], Iterator[tuple[int, str]]]] = {
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
