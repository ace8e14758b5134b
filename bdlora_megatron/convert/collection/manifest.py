"""The two JSON files of a collection: `collection.json`, and `core.json` of each adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from bdlora_megatron.convert.adapter.neutral import BaseShape, ModuleKey
from bdlora_megatron.convert.hints import unreadable
from bdlora_megatron.convert.tensor_files import FLOATS
from bdlora_megatron.decoder import ModuleName
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from bdlora_megatron.settings import FORBID_UNKNOWN, Count, Natural, Number, read_settings

__all__ = [
    "COLLECTION_NAME",
    "CORE_NAME",
    "VERSION",
    "AdapterEntry",
    "Manifest",
    "ModuleCore",
    "ModuleEntry",
    "OneCore",
    "cluster_folder",
    "read_core_file",
    "read_manifest_file",
    "write_json",
]

COLLECTION_NAME, CORE_NAME = "collection.json", "core.json"
VERSION = 1
_LARGEST = 64 << 20
#: The name of a folder and nothing else.
_FileName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$", max_length=255)]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class ModuleEntry:
    """A module that some compressed adapter has.

    Attributes:
        layer: The decoder layer.
        name: The projection.
        in_features: I.
        out_features: O.
    """

    layer: Natural
    name: ModuleName
    in_features: Count
    out_features: Count

    @property
    def key(self) -> ModuleKey:
        """Layer and name."""
        return ModuleKey(layer=self.layer, name=self.name)


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class AdapterEntry:
    """An adapter of a collection.

    Attributes:
        name: Its name, and its folder's.
        cluster: Whose basis it uses; None if it is kept whole.
        error: What compressing it loses or would lose: the Frobenius norm of the difference over
            that of the update, all modules together. None where no basis was fitted to it.
    """

    name: _FileName
    cluster: Natural | None
    error: Number | None


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class Manifest:
    """What `collection.json` says.

    Attributes:
        fingerprint: Tells the collection from any other: a hash of the adapters and options.
        form: `shared` for one basis of the whole module, `blocked` for one of each rank's slice.
        num_blocks: N, the slices; 1 in the shared form.
        rank: k, the most columns of a basis, over all slices.
        core: Whether cores are full or diagonal.
        dtype: The type of bases and cores.
        clusters: The number of clusters.
        base: What is known of the base model.
        modules: Every module that a basis is there for.
        adapters: Every adapter, by name.
    """

    format: Literal["bdlora-collection"] = "bdlora-collection"
    version: Literal[1] = 1
    fingerprint: str
    form: Literal["shared", "blocked"]
    num_blocks: Count
    rank: Count
    core: Literal["full", "diagonal"]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    clusters: Natural
    base: BaseShape
    modules: tuple[ModuleEntry, ...]
    adapters: tuple[AdapterEntry, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of bases and cores."""
        return next(dtype for dtype in FLOATS.values() if str(dtype) == f"torch.{self.dtype}")


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class ModuleCore:
    """What became of one module of an adapter.

    Attributes:
        layer: The decoder layer.
        name: The projection.
        rank: The rank that the adapter had.
        scale: The scale that it had; the core includes it.
        error: The relative error of the module.
    """

    layer: Natural
    name: ModuleName
    rank: Count
    scale: Annotated[float, Field(allow_inf_nan=False)]
    error: Number

    @property
    def key(self) -> ModuleKey:
        """Layer and name."""
        return ModuleKey(layer=self.layer, name=self.name)


@dataclass(frozen=True, kw_only=True, config=FORBID_UNKNOWN)
class OneCore:
    """What `core.json` says.

    Attributes:
        name: The adapter's name.
        collection: The fingerprint of the collection that it belongs to.
        cluster: Whose basis it uses.
        metadata: The adapter's.
        modules: Every module of it.
    """

    format: Literal["bdlora-core"] = "bdlora-core"
    version: Literal[1] = 1
    name: _FileName
    collection: str
    cluster: Natural
    metadata: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[ModuleCore, ...]


def cluster_folder(number: int) -> str:
    """The name of a cluster's folder."""
    return f"cluster_{number:03}"


def write_json(path: Path, content: Manifest | OneCore) -> None:
    """Write one of the two files."""
    raw = asdict(content)
    if isinstance(content, Manifest):
        raw["base"] = {side: width for side, width in raw["base"].items() if width is not None}
    # A core's file is one of thousands, and its core is not much larger.
    indent = 1 if isinstance(content, Manifest) else None
    path.write_text(json.dumps(raw, indent=indent) + "\n", "utf-8")


def read_manifest_file(folder: Path) -> Manifest:
    """Read `collection.json`.

    Raises:
        AdapterFormatError: If it is missing or broken. All that is wrong is listed.
    """
    path = folder / COLLECTION_NAME
    if not path.is_file():
        raise AdapterFormatError(
            f"{folder} holds no {COLLECTION_NAME}; pass the folder that bdlora compress wrote"
        )
    return _read(path, Manifest, "bdlora-collection")


def read_core_file(folder: Path) -> OneCore:
    """Read `core.json`.

    Raises:
        AdapterFormatError: If it is missing or broken. All that is wrong is listed.
    """
    return _read(folder / CORE_NAME, OneCore, "bdlora-core")


def _read(path: Path, kind: type[T], format: str) -> T:
    raw = _parsed(path)
    if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (format, VERSION):
        got = raw if isinstance(raw, dict) else {}
        raise AdapterFormatError(
            f"{path} says format {got.get('format')!r}, version {got.get('version')!r}; wanted "
            f"{format!r}, version {VERSION}; update bdlora-megatron if the version is newer"
        )
    try:
        return read_settings(kind, raw, str(path))
    except ConfigError as error:
        raise AdapterFormatError(str(error)) from error


def _parsed(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise AdapterFormatError(f"{path} is larger than {_LARGEST} bytes; it is none of ours")
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterFormatError):
            raise
        why = unreadable(path, error, "compress the adapters again")
        raise AdapterFormatError(f"{path} cannot be read{why}") from error
