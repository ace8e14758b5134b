"""Reading a collection: bases by cluster, cores by adapter, and each adapter as any other.

collection.json
cluster_000/basis.safetensors     layers.0.self_attn.q_proj.U, .V, ...
adapters/poet/core.json           what the tensors don't tell
adapters/poet/core.safetensors    layers.0.self_attn.q_proj.S, ...
adapters/odd/                     a PEFT folder: an adapter that is kept whole
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.blocks.factors import from_block_views
from bdlora_megatron.convert.adapter.lazy import LazyModules
from bdlora_megatron.convert.adapter.neutral import Adapter, ModuleKey, blocked_factor
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.collection.manifest import (
    COLLECTION_NAME,
    CORE_NAME,
    AdapterEntry,
    Manifest,
    OneCore,
    cluster_folder,
    read_core_file,
    read_manifest_file,
)
from bdlora_megatron.convert.collection.tensors import (
    LazyTensors,
    ModuleBasis,
    basis_facts,
    core_facts_of,
    finite,
)
from bdlora_megatron.convert.tensor_files import open_safetensors
from bdlora_megatron.errors import AdapterFormatError, AdapterNotFoundError, nearest

__all__ = [
    "ADAPTERS",
    "BASIS_FILE",
    "CORE_FILE",
    "Collection",
    "open_compressed",
    "read_collection",
]

ADAPTERS, BASIS_FILE, CORE_FILE = "adapters", "basis.safetensors", "core.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Collection:
    """A folder of adapters that share bases.

    Attributes:
        folder: Where it is.
        manifest: What `collection.json` says.
    """

    folder: Path
    manifest: Manifest

    def entry(self, name: str) -> AdapterEntry:
        """What the collection says of an adapter.

        Raises:
            AdapterNotFoundError: If it has no such adapter.
        """
        for entry in self.manifest.adapters:
            if entry.name == name:
                return entry
        names = [entry.name for entry in self.manifest.adapters]
        raise AdapterNotFoundError(f"{self.folder} has no adapter {name!r}; {nearest(name, names)}")

    def adapter_folder(self, name: str) -> Path:
        """The folder of an adapter, a PEFT folder if it is kept whole."""
        return self.folder / ADAPTERS / self.entry(name).name

    @contextmanager
    def basis(self, cluster: int) -> Iterator[LazyTensors[ModuleBasis]]:
        """Open the basis of a cluster.

        Args:
            cluster: Its number.

        Yields:
            The basis of every module, read when it is looked up, as long as the file is open.

        Raises:
            AdapterFormatError: If the file is missing or broken, or no basis of this collection.
        """
        path = self.folder / cluster_folder(cluster) / BASIS_FILE
        with open_safetensors(path) as source:
            facts = basis_facts(path, source, self.manifest)

            def load(key: ModuleKey) -> ModuleBasis:
                U, V = (finite(path, source, f"{key}.{side}") for side in "UV")
                return ModuleBasis(U=U, V=V)

            yield LazyTensors(facts, load)

    @contextmanager
    def cores(self, name: str) -> Iterator[LazyTensors[Tensor]]:
        """Open the cores of an adapter, which include its scale.

        Args:
            name: The adapter.

        Yields:
            The core of every module it has, `[N, k, k]` or `[N, k]` (diagonal).

        Raises:
            AdapterFormatError: If the file is missing or broken, the adapter is kept whole, or is
                of another collection.
            AdapterNotFoundError: If there is no such adapter.
        """
        one = self.core_facts(name)
        path = self.adapter_folder(name) / CORE_FILE
        with open_safetensors(path) as source:
            facts = core_facts_of(path, source, one, self.manifest)
            yield LazyTensors(facts, lambda key: finite(path, source, f"{key}.S"))

    def core_facts(self, name: str) -> OneCore:
        """What `core.json` says of an adapter.

        Raises:
            AdapterFormatError: If the adapter is kept whole, or is of another collection.
        """
        folder = self.adapter_folder(name)
        if self.entry(name).cluster is None:
            raise AdapterFormatError(
                f"adapter {name!r} is kept whole; read it from {folder}, as any PEFT folder"
            )
        one = read_core_file(folder)
        found = (one.collection, one.cluster)
        if found != (self.manifest.fingerprint, self.entry(name).cluster):
            raise AdapterFormatError(
                f"{folder} is of another collection than {self.folder / COLLECTION_NAME}; a core "
                "means nothing in another basis: copy collections whole"
            )
        return one

    @contextmanager
    def adapter(self, name: str) -> Iterator[Adapter]:
        """Open a compressed adapter as any other: B is U S and A is V^T.

        In the blocked form it is a BD-LoRA of N blocks. Numbers of 16 bits become float32, so that
        the products are not rounded to the type of their factors.

        Args:
            name: The adapter.

        Yields:
            The adapter, whose modules are computed when they are looked up.

        Raises:
            AdapterFormatError: If files are missing or broken, or disagree. All is listed.
            AdapterNotFoundError: If there is no such adapter.
        """
        one = self.core_facts(name)
        with self.cores(name) as cores, self.basis(one.cluster) as basis:
            subject = f"cannot read the compressed adapter {name!r} in {self.folder}"
            problems = Problems()
            facts = {}
            for key, core in cores.facts.items():
                if key not in basis.facts:
                    problems.add(
                        "the cluster has no basis of modules that the core is of", str(key)
                    )
                elif core.shape[1] != basis.facts[key].U.shape[2]:
                    problems.add("the core has another size than the basis", str(key))
                else:
                    facts[key] = expanded(key, basis.facts[key], core)
            problems.raise_if_any(subject)
            yield Adapter(
                name=name,
                modules=LazyModules(
                    facts, lambda key: expanded(key, basis[key], cores[key]), subject=subject
                ),
                base=self.manifest.base,
                metadata=one.metadata,
            )


def read_collection(folder: str | Path) -> Collection:
    """Read what a collection holds; bases and cores are read when they are asked for.

    Args:
        folder: What `bdlora compress` wrote.

    Raises:
        AdapterFormatError: If it is no collection, or `collection.json` is broken.
    """
    path = Path(folder).resolve()
    manifest = read_manifest_file(path)
    problems = Problems()
    names = [entry.name for entry in manifest.adapters]
    if len(set(names)) < len(names):
        problems.add("adapters have one name twice", *{n for n in names if names.count(n) > 1})
    for entry in manifest.adapters:
        if entry.cluster is not None and entry.cluster >= manifest.clusters:
            problems.add(f"there are {manifest.clusters} clusters, counted from 0", entry.name)
    if (manifest.form == "shared" and manifest.num_blocks != 1) or (
        manifest.rank % manifest.num_blocks
    ):
        problems.add(
            f"form {manifest.form}, num_blocks {manifest.num_blocks} and rank {manifest.rank} "
            "disagree"
        )
    problems.raise_if_any(f"{path / COLLECTION_NAME} is broken")
    return Collection(folder=path, manifest=manifest)


@contextmanager
def open_compressed(folder: Path) -> Iterator[Adapter]:
    """Open `adapters/NAME` of a collection as an adapter.

    Raises:
        AdapterFormatError: If the folder is not in its collection, or files are broken.
    """
    folder = folder.resolve()
    one = read_core_file(folder)
    root = folder.parent.parent
    if not (root / COLLECTION_NAME).is_file() or folder.parent.name != ADAPTERS:
        raise AdapterFormatError(
            f"{folder} holds a core ({CORE_NAME}), which needs the basis in its collection, two "
            "folders up; copy collections whole"
        )
    if one.name != folder.name:
        raise AdapterFormatError(
            f"{folder} holds the core of {one.name!r}; a core's folder has the adapter's name"
        )
    with read_collection(root).adapter(one.name) as adapter:
        yield adapter


def expanded(key: ModuleKey, basis: ModuleBasis, core: Tensor) -> BlockFactors:
    """A core in its basis as the factors of an update.

    Returns:
        Vanilla factors of rank k where N is 1; else those of a BD-LoRA with N blocks.
    """
    dtype = torch.promote_types(core.dtype, torch.float32)
    U, V, S = (tensor.double() for tensor in (basis.U, basis.V, core))
    outputs = (U * S[:, None] if S.dim() == 2 else U @ S).to(dtype)
    inputs = V.to(dtype)
    blocked = blocked_factor(key.name)
    packed, dense = (outputs, inputs) if blocked == "B" else (inputs, outputs)
    return from_block_views(packed, dense.mT, blocked=blocked, scale=1.0)
