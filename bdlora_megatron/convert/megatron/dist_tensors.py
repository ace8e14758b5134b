"""Tensors in the format of `megatron.core.dist_checkpointing` (torch_dist), one part at a time.

Such a folder holds `.metadata` (a pickle: every tensor's size, type and chunks), `*.distcp` (the
chunks), `common.pt` and `metadata.json`. Reading here needs no process group and no model: the
pickle may name the few classes of which this metadata consists and nothing else, every size is
checked against the files before memory is taken, and only the chunks that are asked for are read.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import EnumMeta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdlora_megatron.convert.hints import file_hint
from bdlora_megatron.convert.tensor_files import FLOATS
from bdlora_megatron.errors import AdapterFormatError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

__all__ = ["METADATA_NAME", "Chunk", "DistTensors", "open_dist_tensors"]

METADATA_NAME = ".metadata"
# Of a checkpoint with optimizer state too; an adapter's own is a few hundred kilobytes.
_LARGEST_METADATA = 256 << 20
_REMEMBERS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# Of one tensor: one from each tensor-parallel rank, two from a gated layer's.
_MOST_CHUNKS = 1024

#: All that a checkpoint's metadata is made of.
_CLASSES = frozenset(
    {
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # Megatron-Core keeps the plans of all ranks for its next save.
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "Path"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)

# Megatron-Core's own kinds of Metadata and SavePlan, in what 0.14 and 0.15 save.
_STRATEGY = "megatron.core.dist_checkpointing.strategies.torch"
_OLD_CLASSES = frozenset({"MCoreMetadata", "MCoreSavePlan"})

_BROKEN = (
    OSError,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of a tensor to write.

    Attributes:
        name: The tensor.
        size: The whole tensor's size.
        offsets: Where this part begins.
        sizes: This part's size.
        dtype: Its type.
    """

    name: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class DistTensors:
    """The tensors of a checkpoint.

    Attributes:
        facts: Every tensor by name, on the meta device; None in place of one that is no float.
        objects: Names of everything that is no tensor.
        row_parts: How many equal stretches of rows every tensor is stored in; None if not equal.
        load: Read a tensor, or where it is a stack of layers, one layer of it.
    """

    facts: Mapping[str, Tensor | None]
    objects: frozenset[str]
    row_parts: Mapping[str, int | None]
    load: Callable[[str, int | None], Tensor]


def open_dist_tensors(folder: Path) -> DistTensors:
    """Look into a checkpoint.

    Returns:
        Its tensors, readable as long as the folder is there.

    Raises:
        AdapterFormatError: If the checkpoint is broken.
    """
    with _explained(folder):
        return _open(folder)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the unpickler and torch raise on broken files, as one kind of error.

    Raises:
        AdapterFormatError: In place of any of them.
    """
    try:
        yield
    except AdapterFormatError:
        raise
    except _BROKEN as error:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        pointers = (f"{path.name}: {hint}" for path in files if (hint := file_hint(path)))
        why = next(pointers, f"{error!r}; copy or save it again")
        raise AdapterFormatError(
            f"{folder} cannot be read as a distributed checkpoint: {why}"
        ) from error


class _OldRecord:
    """What a class of Megatron-Core 0.14 or 0.15 held, whichever release is installed here."""


class _Unpickler(pickle.Unpickler):
    """Builds metadata and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever a checkpoint's metadata has no use for.

        Raises:
            UnpicklingError: If the pickle names something else.
        """
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        if module == _STRATEGY and name in _OLD_CLASSES:
            return _OldRecord
        if (module, name) == ("builtins", "getattr"):
            return _member
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, (torch.dtype, torch.layout, torch.memory_format)):
            return kind
        raise pickle.UnpicklingError(
            f"its metadata names {module}.{name}, which has no place there"
        )


def _member(kind: Any, name: Any) -> Any:
    """A member of an enumeration, which early releases of Python 3.11 pickle by its name.

    Raises:
        UnpicklingError: It is no such thing.
    """
    if not (isinstance(kind, EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(
            f"its metadata asks for {name!r} of {kind!r}, which has no place there"
        )
    return kind.__members__[name]


def _open(folder: Path) -> DistTensors:
    # Late: its package takes seconds, which other formats need not wait for.
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _read_metadata(folder / METADATA_NAME)
    tensors: dict[str, TensorStorageMetadata] = {}
    facts: dict[str, Tensor | None] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = entry
            dtype = entry.properties.dtype
            known = dtype in FLOATS.values()
            facts[name] = torch.empty(entry.size, dtype=dtype, device="meta") if known else None
    storage = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    files = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}

    def load(name: str, layer: int | None) -> Tensor:
        entry = tensors[name]
        with _explained(folder):
            wanted = [c for c in entry.chunks if layer is None or c.offsets[0] == layer]
            _check_chunks(name, entry, wanted, layer)
            places = [storage[name, chunk.offsets] for chunk in wanted]
            _check_places(name, places, files, facts[name], layer)
            return _assemble(folder, entry, list(zip(wanted, places, strict=True)), layer)

    return DistTensors(
        facts=facts,
        objects=frozenset(metadata.state_dict_metadata.keys() - tensors.keys()),
        row_parts={name: _row_parts(entry) for name, entry in tensors.items()},
        load=load,
    )


def _read_metadata(path: Path) -> Any:
    size = path.stat().st_size
    if size > _LARGEST_METADATA:
        raise AdapterFormatError(f"{path} has {size} bytes, which no adapter's has")
    content = path.read_bytes()
    # The unpickler makes room for the largest number that an object is remembered under, whatever
    # number a file claims, and no more objects can be remembered than there are bytes.
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name in _REMEMBERS and (number or 0) >= len(content):
            raise AdapterFormatError(f"{path} remembers an object as number {number}; it is broken")
    # From memory: of a file, the unpickler would ask for as many bytes as it claims to have.
    return _Unpickler(io.BytesIO(content)).load()


def _row_parts(entry: TensorStorageMetadata) -> int | None:
    if len(entry.size) < 2:
        return None
    heights = {chunk.sizes[-2] for chunk in entry.chunks}
    starts = {chunk.offsets[-2] for chunk in entry.chunks}
    equal = len(heights) == 1 and len(starts) * heights.pop() == entry.size[-2]
    return len(starts) if equal else None


def _check_chunks(
    name: str,
    entry: TensorStorageMetadata,
    chunks: Sequence[ChunkStorageMetadata],
    layer: int | None,
) -> None:
    """The chunks must fill the tensor, or the layer, exactly.

    Raises:
        AdapterFormatError: If they do not.
    """
    if len(chunks) > _MOST_CHUNKS:
        raise AdapterFormatError(f"{name} is in {len(chunks)} parts, more than {_MOST_CHUNKS}")
    inside = all(
        min(offset, length) >= 0 and offset + length <= limit
        for chunk in chunks
        for offset, length, limit in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
    )
    flat = layer is None or all(chunk.sizes[0] == 1 for chunk in chunks)
    numbers = sum(math.prod(chunk.sizes) for chunk in chunks)
    wanted = math.prod(entry.size if layer is None else entry.size[1:])
    apart = not any(_overlap(one, other) for one, other in itertools.combinations(chunks, 2))
    if not (inside and flat and apart and numbers == wanted):
        where = "" if layer is None else f" of layer {layer}"
        raise AdapterFormatError(
            f"the parts of {name}{where} do not fill it ({numbers} of {wanted} numbers); "
            "copy or save the checkpoint again"
        )


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    return all(
        max(begin, start) < min(begin + length, start + width)
        for begin, length, start, width in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )


def _check_places(
    name: str,
    places: Sequence[Any],
    files: Mapping[str, int],
    fact: Tensor | None,
    layer: int | None,
) -> None:
    """The files must hold as many bytes as the tensor needs, before memory is taken for it.

    Raises:
        AdapterFormatError: If they do not.
    """
    for place in places:
        size = files.get(place.relative_path)
        if size is None:
            raise AdapterFormatError(
                f"{place.relative_path!r}, which should hold {name}, is missing; copy the "
                "checkpoint again"
            )
        if min(place.offset, place.length) < 0 or place.offset + place.length > size:
            raise AdapterFormatError(
                f"{place.relative_path} is too short for {name}; copy the checkpoint again"
            )
    assert fact is not None, "the caller has refused tensors that are no floats"
    wanted = fact.nbytes // (1 if layer is None else fact.shape[0])
    if sum(place.length for place in places) < wanted:
        raise AdapterFormatError(f"{name} claims more numbers than the files hold")


def _assemble(
    folder: Path,
    entry: TensorStorageMetadata,
    parts: Sequence[tuple[ChunkStorageMetadata, Any]],
    layer: int | None,
) -> Tensor:
    """Read chunks into their places.

    Raises:
        AdapterFormatError: If a chunk is not what the metadata says.
    """
    shape = entry.size if layer is None else entry.size[1:]
    out = torch.empty(shape, dtype=entry.properties.dtype)
    whole = out if layer is None else out.unsqueeze(0)
    for chunk, place in parts:
        part = _read(folder, place)
        target = whole
        for dim, (offset, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            start = 0 if dim == 0 and layer is not None else offset
            target = target.narrow(dim, start, length)
        if part.shape != target.shape or part.dtype != target.dtype:
            raise AdapterFormatError(
                f"{place.relative_path} holds {list(part.shape)} {part.dtype} where its metadata "
                f"says {list(target.shape)} {target.dtype}; copy or save the checkpoint again"
            )
        target.copy_(part)
    return out


def _read(folder: Path, place: Any) -> Tensor:
    """One chunk, which is a file of `torch.save` inside a file.

    Raises:
        AdapterFormatError: If it is something else.
    """
    if getattr(place, "transform_descriptors", None):
        raise AdapterFormatError("the checkpoint is compressed; save it without")
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        part = torch.load(
            io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True
        )
    if not isinstance(part, Tensor):
        raise AdapterFormatError(f"{place.relative_path} holds a {type(part).__name__}, no tensor")
    return part
