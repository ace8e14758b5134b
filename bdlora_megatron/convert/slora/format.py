"""S-LoRA's tensor-parallel shards: one safetensors file per rank, cut as its `tp` branch cuts them.

    slora.json            what the tensors don't tell
    rank_0.safetensors    q, k, v: A [R / P, I], B [O / P, R]; o: A [R, I / P], B [O / P, R]

S-LoRA itself reads PEFT's folders and cuts them in memory; what it can serve is narrower than what
PEFT writes, and is checked here: the attention's four projections in every layer, one rank and one
scale for all, no grouped queries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter.invocation import UNSAYABLE
from bdlora_megatron.convert.adapter.lazy import LazyModules, module_facts
from bdlora_megatron.convert.adapter.neutral import (
    Adapter,
    BaseShape,
    ModuleKey,
    blocked_factor,
    infer_base_shape,
)
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.scale import with_one_scale
from bdlora_megatron.convert.megatron.format import merge_base
from bdlora_megatron.convert.megatron.manifest import (
    Manifest,
    manifest_of,
    read_manifest,
    write_manifest,
)
from bdlora_megatron.convert.tensor_files import (
    TensorSource,
    TensorWriter,
    open_safetensors,
    write_safetensors,
)
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.errors import ShapeError, UnsupportedError

__all__ = ["MANIFEST_NAME", "adapter_name", "open_slora", "write_slora"]

MANIFEST_NAME = "slora.json"
_FORMAT = "slora-shards"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapter_name(path: Path) -> str:
    """The adapter's name by S-LoRA's convention: `-<n>` at the end tells copies of one apart.

    Args:
        path: The adapter's folder, or the path it is listed under.

    Returns:
        The last part of the path without the number.
    """
    return re.sub(r"-\d+$", "", path.name) or path.name


@contextmanager
def open_slora(folder: Path) -> Iterator[Adapter]:
    """Open a folder of shards.

    Args:
        folder: The adapter's folder. `-<n>` at its end is no part of the adapter's name, and where
            there is no such folder, the one without is opened, as S-LoRA does.

    Raises:
        AdapterFormatError: If the files are missing or broken, or disagree. All such problems are
            listed.
    """
    name = adapter_name(folder)
    if not folder.exists():
        folder = folder.with_name(name)
    folder = folder.resolve()
    manifest = read_manifest(folder / MANIFEST_NAME, _FORMAT)
    subject = f"cannot read the S-LoRA shards in {folder}"
    problems = Problems()
    with ExitStack() as stack:
        shards = [
            stack.enter_context(open_safetensors(folder / _file_name(rank)))
            for rank in range(manifest.tp)
        ]
        facts = _facts(shards, manifest, problems)
        try:
            widths = infer_base_shape((k, f.in_features, f.out_features) for k, f in facts.items())
        except ShapeError as error:
            problems.add(str(error))
            widths = BaseShape()
        base = merge_base(manifest.base, widths, problems)
        problems.raise_if_any(subject)

        def load(key: ModuleKey) -> BlockFactors:
            parts = [[shard.load(name) for shard in shards] for name in _names(key)]
            return _joined(key, parts, manifest.modules[key].scale)

        yield Adapter(
            name=name,
            modules=LazyModules(facts, load, subject=subject),
            base=base,
            invocation_tokens=manifest.invocation_tokens,
            metadata=manifest.metadata,
        )


def write_slora(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write one file of tensors for each of `options.tp` ranks.

    Raises:
        UnsupportedError: If S-LoRA cannot serve the adapter. All reasons are listed.
    """
    facts = module_facts(adapter)
    problems = Problems()
    if adapter.invocation_tokens:
        problems.add(UNSAYABLE)
    _check(facts, options.tp, problems, f"cannot write adapter {adapter.name!r} for S-LoRA")
    adapter = with_one_scale(adapter)
    facts = module_facts(adapter)
    write_manifest(folder / MANIFEST_NAME, manifest_of(adapter, facts, _FORMAT, options.tp))
    keys = sorted(facts, key=lambda key: (-facts[key].dtype.itemsize, key))
    with ExitStack() as stack:
        writers: list[TensorWriter] = []
        for rank in range(options.tp):
            tensors: dict[str, Tensor] = {}
            for key in keys:
                tensors.update(_cut(key, facts[key], rank, options.tp))
            path = folder / _file_name(rank)
            writers.append(stack.enter_context(write_safetensors(path, tensors, {"format": "pt"})))
        for key in keys:
            factors = adapter.modules[key]
            for rank, write in enumerate(writers):
                for name, tensor in _cut(key, factors, rank, options.tp).items():
                    write(name, tensor)


def _file_name(rank: int) -> str:
    return f"rank_{rank}.safetensors"


def _names(key: ModuleKey) -> tuple[str, str]:
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight"


def _a_dim(key: ModuleKey) -> int:
    """The dimension on which ranks split A: the input for `o_proj`, the rank for the others."""
    return 1 if key.name == "o_proj" else 0


def _cut(key: ModuleKey, factors: BlockFactors, rank: int, tp: int) -> dict[str, Tensor]:
    A = factors.A.chunk(tp, dim=_a_dim(key))[rank]
    return dict(zip(_names(key), (A, factors.B.chunk(tp)[rank]), strict=True))


def _joined(key: ModuleKey, parts: list[list[Tensor]], scale: float) -> BlockFactors:
    return BlockFactors(
        A=torch.cat(parts[0], dim=_a_dim(key)),
        B=torch.cat(parts[1]),
        num_blocks=1,
        blocked=blocked_factor(key.name),
        scale=scale,
    )


def _facts(
    shards: list[TensorSource], manifest: Manifest, problems: Problems
) -> dict[ModuleKey, BlockFactors]:
    facts = {}
    wanted: set[str] = set()
    for key, entry in manifest.modules.items():
        wanted.update(_names(key))
        if key.name not in _ATTENTION or entry.num_blocks != 1:
            problems.add(f"modules of {MANIFEST_NAME} are not what S-LoRA shards hold", str(key))
            continue
        parts = [[shard.facts.get(name) for shard in shards] for name in _names(key)]
        whole = [[part for part in side if part is not None] for side in parts]
        if any(len(side) < len(shards) for side in whole):
            problems.add("a rank has no such tensors of F64, F32, F16 or BF16", str(key))
            continue
        if any(len({(part.shape, part.dtype) for part in side}) > 1 for side in whole):
            problems.add("the ranks' shares differ in shape or type", str(key))
            continue
        try:
            facts[key] = _joined(key, whole, entry.scale)
        except (ShapeError, RuntimeError, IndexError) as error:
            problems.add(str(error), str(key))
    for shard in shards:
        for name in sorted(shard.facts.keys() - wanted):
            problems.add(f"tensors are of no module in {MANIFEST_NAME}", name)
    if not manifest.modules:
        problems.add(f"{MANIFEST_NAME} has no modules")
    return facts


def _check(
    facts: Mapping[ModuleKey, BlockFactors], tp: int, problems: Problems, subject: str
) -> None:
    """List all that S-LoRA cannot serve."""
    mlp = [str(key) for key in facts if key.name not in _ATTENTION]
    if mlp:
        problems.add(
            "it adapts attention only, and would leave the MLP's modules out in silence; train "
            "without them, or serve this adapter from another format",
            *mlp,
        )
    blocked = [str(key) for key, factors in facts.items() if factors.num_blocks > 1]
    if blocked:
        problems.add(
            "modules have blocks, which it has not; write the same update as vanilla LoRA "
            "(--dense, WriteOptions(dense=True))",
            *blocked,
        )
    ranks = sorted({factors.rank for factors in facts.values()})
    if len(ranks) > 1:
        problems.add(f"modules have ranks {ranks}, and it reads one r for all")
    layers = {key.layer for key in facts}
    missing = [
        str(key)
        for layer in range(max(layers) + 1)
        for name in _ATTENTION
        if (key := ModuleKey(layer=layer, name=name)) not in facts  # type: ignore[arg-type]
    ]
    if missing:
        problems.add("it needs q, k, v and o in every layer; these are missing", *missing)
    _check_widths(facts, tp, problems)
    problems.raise_if_any(subject, UnsupportedError)


def _check_widths(facts: Mapping[ModuleKey, BlockFactors], tp: int, problems: Problems) -> None:
    query = {f.out_features for key, f in facts.items() if key.name == "q_proj"}
    grouped = [
        str(key)
        for key, factors in facts.items()
        if key.name in ("k_proj", "v_proj") and query - {factors.out_features}
    ]
    if grouped:
        problems.add(
            "the base model has fewer key-value heads than query heads (GQA), and it keeps one "
            "row per query head for each",
            *grouped,
        )
    for key, factors in facts.items():
        split = factors.in_features if key.name == "o_proj" else factors.rank
        if split % tp or factors.out_features % tp:
            problems.add(
                f"rank or width is no multiple of tp={tp}; use fewer ranks, or another rank",
                str(key),
            )
