"""Adapter checkpoints of Megatron-Bridge and NeMo 2: fused (LoRA) and canonical (CanonicalLoRA).

Both store whole tensors through `megatron.core.dist_checkpointing`. Two things are theirs:

- LoRA has one pair for all of `linear_qkv` or `linear_fc1`.
- CanonicalLoRA saves B of `adapter_gate` and `adapter_up` as if each were a gated layer of its own:
  every rank's rows are cut in two, and the file holds all first halves, then all second halves. Its
  row order depends on the tensor-parallel size that saved it, and loading it there at another size
  permutes rows. Reading puts them right; writing asks for the size that will load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors, pad_rank
from bdlora_megatron.convert.adapter.invocation import UNSAYABLE
from bdlora_megatron.convert.adapter.lazy import map_modules, module_facts
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES, Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.scale import nearest_alpha, warn_inexact, with_one_scale
from bdlora_megatron.convert.bridge.config import (
    RUN_CONFIG_NAME,
    BridgeSettings,
    locate,
    read_settings,
    write_settings,
)
from bdlora_megatron.convert.megatron.dist_tensors import Chunk, DistTensors, open_dist_tensors
from bdlora_megatron.convert.megatron.format import (
    common_state,
    layer_chunk,
    merge_base,
    stacked_layers,
)
from bdlora_megatron.convert.megatron.names import fuse, linear_of, stem
from bdlora_megatron.convert.megatron.reader import Pair, PairSettings, find_pairs, pair_modules
from bdlora_megatron.convert.megatron.run import (
    is_training_state,
    own_settings,
    with_main_copies,
)
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.decoder import PARTS, facts_of
from bdlora_megatron.errors import UnsupportedError

__all__ = ["open_bridge", "write_bridge"]

_GATED = "mlp.linear_fc1"


@contextmanager
def open_bridge(folder: Path, *, base: BaseShape | None = None) -> Iterator[Adapter]:
    """Open an adapter checkpoint of Megatron-Bridge or NeMo 2, saved at any parallel size.

    Args:
        folder: See `locate`.
        base: The base model's heads, where the checkpoint's own settings do not tell them.

    Yields:
        The adapter, vanilla LoRA or our integration's blocks; a pair that serves a fused layer
        comes as one update for each projection, with the same A.

    Raises:
        AdapterFormatError: If the files are missing or broken, or hold what cannot be represented.
            All such problems are listed.
    """
    folder = folder.resolve()
    weights, config = locate(folder)
    settings = read_settings(config)
    tensors = open_dist_tensors(weights)
    if settings.own is not None:
        tensors = with_main_copies(tensors)
    problems = Problems()
    subject = f"cannot read the adapter in {folder}"
    pairs = find_pairs(tensors, problems, ignore=is_training_state)
    if settings.layers is not None:
        pairs = _by_layer(pairs, settings.layers, problems)
    known = merge_base(settings.base, base or BaseShape(), problems)
    sizes: dict[Pair, int] = {}
    if settings.own is None:
        setting = PairSettings(num_blocks=1, scale=settings.alpha / settings.dim)
        of_pairs = dict.fromkeys(pairs, setting)
        sizes = _check_pairs(pairs, tensors, settings, problems)
    else:
        of_pairs = own_settings(settings.own, pairs, tensors, problems)
    modules, widths = pair_modules(
        tensors,
        of_pairs,
        known,
        problems,
        subject=subject,
        reorder=lambda pair, B: _in_order(B, sizes.get(pair, 1)),
    )
    shape = merge_base(known, widths, problems)
    problems.raise_if_any(subject)
    metadata = {**settings.metadata, "iteration": weights.name}
    yield Adapter(name=folder.name, modules=modules, base=shape, metadata=metadata)


def _by_layer(pairs: list[Pair], layers: Sequence[int], problems: Problems) -> list[Pair]:
    """The pairs of a hybrid model's positions, under the numbers of their decoder layers."""
    lost = [pair for pair in pairs if pair.stacked or pair.layer >= len(layers)]
    if lost:
        problems.add("pairs are at no position of the hybrid_layer_pattern", *map(str, lost))
    kept = [pair for pair in pairs if pair not in lost]
    return sorted(replace(pair, layer=layers[pair.layer]) for pair in kept)


def write_bridge(adapter: Adapter, folder: Path, options: WriteOptions) -> None:
    """Write a checkpoint that Megatron-Bridge resumes from: `iter_0000000` and its tracker.

    Ranks that differ, or that `options.tp` does not divide, are padded with zeros to one that it
    does, since Bridge has one rank for all modules; that is exact.

    Args:
        adapter: What to write.
        folder: An empty folder.
        options: `tp` is the tensor-parallel size that will load it, `fused` asks for LoRA instead
            of CanonicalLoRA.

    Raises:
        UnsupportedError: If modules have blocks, or what is fused has no common A. All such
            problems are listed.
    """
    facts = module_facts(adapter)
    subject = f"cannot write adapter {adapter.name!r} for Megatron-Bridge"
    _check_writable(adapter, facts, options, subject)
    rank = -(-max(f.rank for f in facts.values()) // options.tp) * options.tp
    padded = map_modules(with_one_scale(adapter), lambda _, f: pad_rank(f, rank), subject=subject)
    facts = module_facts(padded)
    pieces = _pieces(facts, fused=options.fused)
    layers = stacked_layers(facts, adapter.base.num_layers)
    chunks, sources = _plan(pieces, facts, padded.base, layers, options.tp)
    loader = _PieceLoader(padded, layers)
    iteration = folder / "iter_0000000"
    iteration.mkdir()
    common = {**common_state(layers), "checkpoint_version": 3.0, "iteration": 0}
    # Late: what it imports takes seconds.
    from bdlora_megatron.convert.megatron.dist_writer import write_dist_tensors

    write_dist_tensors(iteration, chunks, lambda number: loader(sources[number]), common)
    scale = next(iter(facts.values())).scale
    alpha = float(nearest_alpha(rank, scale, use_rslora=False))
    warn_inexact(adapter.name, [] if alpha / rank == scale else list(facts))
    settings = BridgeSettings(
        dim=rank,
        alpha=alpha,
        tp=options.tp,
        base=adapter.base,
        metadata={},
    )
    names = [name for name in MODULE_NAMES if any(key.name == name for key in facts)]
    places = [facts_of(name) for name in names]
    targets = [linear.name if options.fused else part.bridge for linear, part in places]
    write_settings(
        iteration / RUN_CONFIG_NAME,
        settings,
        fused=options.fused,
        targets=list(dict.fromkeys(targets)),
    )
    _write_tracker(folder, iteration)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A pair of factors to write: one module's, or all of a fused layer's."""

    linear: str
    part: str
    layer: int
    keys: tuple[ModuleKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where a chunk's numbers come from: a slice of the rows of a piece's A or B."""

    piece: _Piece
    side: str
    rows: slice


class _PieceLoader:
    """Loads one piece at a time."""

    def __init__(self, adapter: Adapter, layers: int | None) -> None:
        self.adapter = adapter
        self.layers = layers
        self._last: tuple[_Piece, BlockFactors] | None = None

    def __call__(self, source: _Source) -> Tensor:
        if self._last is None or self._last[0] != source.piece:
            self._last = None
            self._last = (source.piece, self._load(source.piece))
        factors = self._last[1]
        tensor = (factors.A if source.side == "in" else factors.B)[source.rows]
        return tensor.unsqueeze(0) if self.layers else tensor

    def _load(self, piece: _Piece) -> BlockFactors:
        parts = [self.adapter.modules[key] for key in piece.keys]
        if len(parts) == 1:
            return parts[0]
        if not all(torch.equal(part.A, parts[0].A) for part in parts[1:]):
            raise UnsupportedError(
                f"the A factors of {', '.join(map(str, piece.keys))} differ, and LoRA for the "
                f"whole {piece.linear} has one for all; write canonical LoRA "
                "(without --fused, WriteOptions(fused=False))"
            )
        named = dict(zip(PARTS[piece.linear], parts, strict=True))
        return fuse(piece.linear, named, self.adapter.base)


def _check_pairs(
    pairs: Sequence[Pair], tensors: DistTensors, settings: BridgeSettings, problems: Problems
) -> dict[Pair, int]:
    """Check ranks, and find the size that saved each pair whose rows are permuted."""
    sizes: dict[Pair, int] = {}
    for pair in pairs:
        A = tensors.facts[pair.names[0]]
        assert A is not None, "find_pairs has refused it"
        if A.shape[-2] != settings.dim:
            problems.add(
                f"linear_in has rank {A.shape[-2]}, but the settings say dim {settings.dim}",
                pair.names[0],
            )
        if pair.linear == _GATED and pair.part:
            parts = tensors.row_parts[pair.names[1]]
            size = parts // 2 if parts and parts % 2 == 0 else None
            if size is None or settings.tp not in (None, size):
                problems.add(
                    f"the tensor is in {parts} parts, which tells no tensor-parallel size"
                    f"{'' if settings.tp is None else f' of {settings.tp}'}, and its row order "
                    "depends on it; load it at the size that saved it and save it again",
                    pair.names[1],
                )
            else:
                sizes[pair] = size
    return sizes


def _in_order(B: Tensor, tp: int) -> Tensor:
    """From all ranks' first halves, then all second halves, to rank by rank."""
    return B if tp == 1 else B.unflatten(0, (2, tp, -1)).transpose(0, 1).flatten(0, 2)


def _check_writable(
    adapter: Adapter,
    facts: Mapping[ModuleKey, BlockFactors],
    options: WriteOptions,
    subject: str,
) -> None:
    problems = Problems()
    if adapter.invocation_tokens:
        problems.add(UNSAYABLE)
    blocked = [str(key) for key, factors in facts.items() if factors.num_blocks > 1]
    if blocked:
        problems.add(
            "modules have blocks, which its LoRA has not; write the same update as vanilla LoRA "
            "(--dense, WriteOptions(dense=True))",
            *blocked,
        )
    unnamed = [str(key) for key in facts if not facts_of(key.name)[1].bridge]
    if unnamed:
        problems.add("its LoRA is read here for the seven projections alone", *unnamed)
    for key, factors in facts.items():
        parts = 2 * options.tp if linear_of(key.name)[0] == _GATED else options.tp
        if factors.out_features % parts:
            problems.add(f"rows are no multiple of {parts}, as tp={options.tp} needs", str(key))
    if options.fused and not unnamed:
        for piece in _pieces(facts, fused=True):
            if len(piece.keys) < len(PARTS[piece.linear]):
                problems.add(
                    f"LoRA for the whole {piece.linear} needs all of its projections; write "
                    "canonical LoRA (without --fused, WriteOptions(fused=False))",
                    *map(str, piece.keys),
                )
    problems.raise_if_any(subject, UnsupportedError)


def _pieces(facts: Mapping[ModuleKey, BlockFactors], *, fused: bool) -> list[_Piece]:
    groups: dict[tuple[int, str, str], list[ModuleKey]] = {}
    for key in facts:
        linear, part = linear_of(key.name)
        place = (key.layer, linear, "" if fused else part)
        groups.setdefault(place, []).append(key)
    order = {name: number for number, name in enumerate(MODULE_NAMES)}
    return [
        _Piece(
            layer=layer,
            linear=linear,
            part=part,
            keys=tuple(sorted(keys, key=lambda key: order[key.name])),
        )
        for (layer, linear, part), keys in sorted(groups.items())
    ]


def _plan(
    pieces: Sequence[_Piece],
    facts: Mapping[ModuleKey, BlockFactors],
    base: BaseShape,
    layers: int | None,
    tp: int,
) -> tuple[list[Chunk], list[_Source]]:
    """The chunks to write, and the rows that each of them holds."""
    chunks, sources = [], []
    for piece in pieces:
        parts = [facts[key] for key in piece.keys]
        whole = parts[0]
        if len(parts) > 1:
            whole = fuse(piece.linear, dict(zip(PARTS[piece.linear], parts, strict=True)), base)
        number = None if layers else piece.layer
        for side, tensor in (("in", whole.A), ("out", whole.B)):
            name = f"{stem(piece.linear, piece.part, number)}linear_{side}.weight"
            chunk = layer_chunk(name, tensor, piece.layer, layers)
            halved = side == "out" and piece.linear == _GATED and piece.part
            for place, rows in _row_parts(tensor.shape[0], tp) if halved else [(0, slice(None))]:
                chunks.append(_narrow(chunk, place, rows, tensor.shape[0]))
                sources.append(_Source(piece=piece, side=side, rows=rows))
    return chunks, sources


def _row_parts(rows: int, tp: int) -> list[tuple[int, slice]]:
    """Where in the file each half of each rank's rows goes, and which rows these are."""
    half = rows // (2 * tp)
    return [
        (
            (which * tp + rank) * half,
            slice((2 * rank + which) * half, (2 * rank + which + 1) * half),
        )
        for which in range(2)
        for rank in range(tp)
    ]


def _narrow(chunk: Chunk, place: int, rows: slice, total: int) -> Chunk:
    start, stop, _ = rows.indices(total)
    return replace(
        chunk,
        offsets=(*chunk.offsets[:-2], place, 0),
        sizes=(*chunk.sizes[:-2], stop - start, chunk.sizes[-1]),
    )


def _write_tracker(folder: Path, iteration: Path) -> None:
    """What tells Megatron-Bridge which iteration to load."""
    state = {
        name: torch.tensor(0, dtype=torch.int32)
        for name in (
            "step",
            "consumed_train_samples",
            "skipped_train_samples",
            "consumed_valid_samples",
        )
    }
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float64)
    for name in ("do_train", "do_valid", "do_test"):
        state[name] = torch.tensor(False)
    torch.save(state, iteration / "train_state.pt")
    torch.save(state, folder / "latest_train_state.pt")
