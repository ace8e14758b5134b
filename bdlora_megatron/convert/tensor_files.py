"""Safetensors files read and written one tensor at a time.

A file is judged by the safetensors library before anything is taken from it. Its numbers are then
read, not mapped: a mapped file that is cut short while in use kills the process, and the mapped
pages count as the process's memory until the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.errors import AdapterFormatError, ShapeError

__all__ = ["FLOATS", "TensorSource", "TensorWriter", "open_safetensors", "write_safetensors"]

#: The types that factors may have, by safetensors' names.
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
# Ten times that of an adapter with seven projections in each of a thousand layers.
_LARGEST_HEADER = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """Named tensors whose facts are known before any data is read.

    Attributes:
        facts: Every tensor by name, without data (on the meta device); None in place of a tensor
            whose type is no float.
        load: Read one tensor by name into memory of its own.
        types: The type's name of every tensor, as its file has it.
    """

    facts: Mapping[str, Tensor | None]
    load: Callable[[str], Tensor]
    types: Mapping[str, str]


@contextmanager
def open_safetensors(path: Path) -> Iterator[TensorSource]:
    """Open a file of tensors.

    Raises:
        AdapterFormatError: If the file is broken.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            header, start = _read_header(file)
            source = _source(path, file, header, start)
        except (OSError, SafetensorError, MemoryError) as error:
            why = unreadable(path, error, "copy or save the adapter again")
            raise AdapterFormatError(f"{path} cannot be read{why}") from error
        yield source


TensorWriter = Callable[[str, Tensor], None]


@contextmanager
def write_safetensors(
    path: Path, facts: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """Write a file of tensors, each as it comes.

    Args:
        path: The new file.
        facts: All tensors that will come, in their order, on the meta device. Types that differ
            in size should come by falling size, which keeps every tensor aligned.
        metadata: Strings for the header.

    Yields:
        A function that takes the next tensor's name and the tensor.

    Raises:
        ShapeError: If another tensor comes than was announced, or one is missing at the end.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, fact in facts.items():
        begin, end = end, end + fact.numel() * fact.itemsize
        header[name] = {
            "dtype": _FLOAT_NAMES[fact.dtype],
            "shape": list(fact.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    expected = iter(facts.items())
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)

        def write(name: str, tensor: Tensor) -> None:
            wanted, fact = next(expected, ("no more tensors", None))
            if name != wanted or fact is None or _facts(tensor) != _facts(fact):
                announced = "" if fact is None else f" {_facts(fact)}"
                raise ShapeError(f"got tensor {name} {_facts(tensor)}, wanted {wanted}{announced}")
            file.write(_bytes_of(tensor.detach().cpu().contiguous()))

        yield write
        missing = next(expected, None)
        if missing is not None:
            raise ShapeError(f"tensor {missing[0]} was announced and never came")


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header that safetensors finds valid, and where the data starts.

    Raises:
        SafetensorError: If it is not valid.
    """
    size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST_HEADER:
        raise SafetensorError(f"its header claims {size} bytes, more than {_LARGEST_HEADER}")
    # Checks the header against the format and the file's size, and reads no data.
    with safe_open(file.name, framework="pt"):
        pass
    try:
        header = json.loads(file.read(size))
    except (ValueError, RecursionError) as error:
        raise SafetensorError(f"its header is no JSON: {error}") from error
    header.pop("__metadata__", None)
    return header, 8 + size


def _source(path: Path, file: BinaryIO, header: Mapping[str, Any], start: int) -> TensorSource:
    facts: dict[str, Tensor | None] = {}
    for name, entry in header.items():
        dtype = FLOATS.get(entry["dtype"])
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
            raise SafetensorError(f"tensor {name} has {end - begin} bytes for shape {shape}")
        facts[name] = None if dtype is None else torch.empty(shape, dtype=dtype, device="meta")

    def load(name: str) -> Tensor:
        fact = facts[name]
        assert fact is not None, "the caller has refused tensors that are no floats"
        try:
            tensor = torch.empty(fact.shape, dtype=fact.dtype)
        except (RuntimeError, MemoryError) as error:
            raise AdapterFormatError(
                f"{path} cannot be read: tensor {name} takes {fact.nbytes} bytes, more memory than "
                "there is; read it where there is more"
            ) from error
        file.seek(start + header[name]["data_offsets"][0])
        target = _bytes_of(tensor)
        read = 0
        while read < len(target):
            more = file.readinto(target[read:])  # type: ignore[attr-defined]
            if not more:
                raise AdapterFormatError(
                    f"{path} became shorter while it was read; copy or save the adapter again"
                )
            read += more
        return tensor

    types = {name: str(entry["dtype"]) for name, entry in header.items()}
    return TensorSource(facts=facts, load=load, types=types)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return tensor.flatten().view(torch.uint8).numpy().data


def _facts(tensor: Tensor) -> tuple[list[int], torch.dtype]:
    return list(tensor.shape), tensor.dtype
