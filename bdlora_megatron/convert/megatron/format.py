"""The sharded checkpoint of our own layers: one that a model with them saves and loads.

    adapter.json    what the tensors don't tell: scale, blocks, base model
    weights/        a folder of megatron.core.dist_checkpointing

The tensors are whole (global) there, so that a model at any tensor-parallel size that its blocks
allow loads its own shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.megatron.dist_tensors import Chunk, open_dist_tensors
from bdlora_megatron.convert.megatron.manifest import (
    Manifest,
    manifest_of,
    read_manifest,
    write_manifest,
)
from bdlora_megatron.convert.megatron.names import linear_of, stem
from bdlora_megatron.convert.megatron.reader import Pair, PairSettings, find_pairs, pair_modules
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.decoder import facts_of, numbering_of
from bdlora_megatron.errors import UnsupportedError

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "common_state",
    "layer_chunk",
    "merge_base",
    "open_megatron",
    "stacked_layers",
    "write_megatron",
]

MANIFEST_NAME = "adapter.json"
WEIGHTS_NAME = "weights"
FORMAT = "bdlora-megatron"


@contextmanager
def open_megatron(folder: Path) -> Iterator[Adapter]:
    """Open a checkpoint with an `adapter.json`, on one process.

    Yields:
        The adapter; a fused layer's pair comes as one update per projection.

    Raises:
        AdapterFormatError: If the files are missing or broken, or disagree. All such problems are
            listed.
    """
    folder = folder.resolve()
    manifest = read_manifest(folder / MANIFEST_NAME, FORMAT)
    tensors = open_dist_tensors(folder / WEIGHTS_NAME)
    problems = Problems()
    subject = f"cannot read the adapter in {folder}"
    numbering = numbering_of(key.name for key in manifest.modules)
    pairs = find_pairs(tensors, problems, ignore=lambda _: False, numbering=numbering)
    settings = _settings(pairs, manifest, problems)
    modules, widths = pair_modules(tensors, settings, manifest.base, problems, subject=subject)
    base = merge_base(manifest.base, widths, problems)
    problems.raise_if_any(subject)
    yield Adapter(
        name=manifest.name,
        modules=modules,
        base=base,
        invocation_tokens=manifest.invocation_tokens,
        metadata=manifest.metadata,
    )


def write_megatron(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write a checkpoint that `dist_checkpointing.load` reads into a model with our layers.

    Where all layers have the same modules with the same shapes, each tensor is a stack of all
    layers, as Megatron-Core's models save them; otherwise each layer has tensors of its own
    (`non_homogeneous_layers`).

    Raises:
        UnsupportedError: A module's rows are stored by stretch, as Mamba's and the delta net's.
    """
    facts = module_facts(adapter)
    _check_writable(adapter.name, facts)
    layers = stacked_layers(facts, adapter.base.num_layers)
    write_manifest(folder / MANIFEST_NAME, manifest_of(adapter, facts, FORMAT, 1))
    chunks: list[Chunk] = []
    sources: list[tuple[ModuleKey, str]] = []
    for key, factors in facts.items():
        for side, tensor in (("in", factors.A), ("out", factors.B)):
            name = (
                f"{stem(*linear_of(key.name), None if layers else key.layer)}linear_{side}.weight"
            )
            chunks.append(layer_chunk(name, tensor, key.layer, layers))
            sources.append((key, side))
    last: dict[ModuleKey, BlockFactors] = {}

    def load(number: int) -> Tensor:
        key, side = sources[number]
        if key not in last:
            # A and B come one after the other: no more than one module is held.
            last.clear()
            last[key] = adapter.modules[key]
        tensor = last[key].A if side == "in" else last[key].B
        return tensor.unsqueeze(0) if layers else tensor

    (folder / WEIGHTS_NAME).mkdir()
    # Late: what it imports takes seconds.
    from bdlora_megatron.convert.megatron.dist_writer import write_dist_tensors

    write_dist_tensors(folder / WEIGHTS_NAME, chunks, load, common_state(layers))


def _check_writable(name: str, facts: Mapping[ModuleKey, BlockFactors]) -> None:
    """Refuse modules whose rows are stored by stretch.

    Raises:
        UnsupportedError: There are some.
    """
    problems = Problems()
    stretched = [str(key) for key in facts if facts_of(key.name)[1].stretches]
    if stretched:
        problems.add(
            "B's rows are stored by stretch, and only the model knows how long each is; load the "
            "adapter into the model and write it with save_adapter",
            *stretched,
        )
    problems.raise_if_any(f"cannot write adapter {name!r} for Megatron-Core", UnsupportedError)


def stacked_layers(facts: Mapping[ModuleKey, BlockFactors], num_layers: int | None) -> int | None:
    """The number of layers if all have the same modules and shapes, else None.

    Args:
        facts: The modules.
        num_layers: Of the base model; taken to be all that are adapted where it is unknown.

    Returns:
        The number, when each tensor can be a stack of all layers.
    """
    by_layer: dict[int, list[tuple[object, ...]]] = {}
    for key, factors in sorted(facts.items()):
        shapes = (key.name, factors.A.shape, factors.B.shape, factors.dtype)
        by_layer.setdefault(key.layer, []).append(shapes)
    count = len(by_layer)
    complete = set(by_layer) == set(range(count)) and count == (num_layers or count)
    same = all(shapes == by_layer[next(iter(by_layer))] for shapes in by_layer.values())
    return count if complete and same else None


def layer_chunk(name: str, tensor: Tensor, layer: int, layers: int | None) -> Chunk:
    """A layer's whole tensor, by itself or in a stack of `layers`."""
    shape = tuple(tensor.shape)
    zeros = (0,) * len(shape)
    if layers is None:
        return Chunk(name=name, size=shape, offsets=zeros, sizes=shape, dtype=tensor.dtype)
    return Chunk(
        name=name,
        size=(layers, *shape),
        offsets=(layer, *zeros),
        sizes=(1, *shape),
        dtype=tensor.dtype,
    )


def common_state(layers: int | None) -> dict[str, dict[str, bool]]:
    """What tells a loader how the layers stand in the checkpoint."""
    return {"content_metadata": {"non_homogeneous_layers": layers is None}}


def merge_base(stated: BaseShape, inferred: BaseShape, problems: Problems) -> BaseShape:
    """Join what is stated of the base model with what the factors tell."""
    known = {}
    for item in fields(BaseShape):
        one, other = getattr(stated, item.name), getattr(inferred, item.name)
        if one is not None and other is not None and one != other:
            problems.add(
                f"the base model's {item.name} is {one}, but the factors are for {other}; they "
                "belong to different base models"
            )
        known[item.name] = other if one is None else one
    return replace(stated, **known)


def _settings(
    pairs: list[Pair], manifest: Manifest, problems: Problems
) -> dict[Pair, PairSettings]:
    settings: dict[Pair, PairSettings] = {}
    left = set(manifest.modules)
    for pair in pairs:
        entries = {manifest.modules.get(key) for key in pair.keys}
        left.difference_update(pair.keys)
        if None in entries or len(entries) > 1:
            what = "are not in" if None in entries else "have several settings for one pair in"
            problems.add(f"modules {what} {MANIFEST_NAME}", *map(str, pair.keys))
            continue
        entry = manifest.modules[pair.keys[0]]
        settings[pair] = PairSettings(num_blocks=entry.num_blocks, scale=entry.scale)
    if left:
        problems.add(f"modules of {MANIFEST_NAME} have no tensors", *map(str, left))
    return settings
