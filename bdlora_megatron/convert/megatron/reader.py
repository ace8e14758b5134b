"""Pairing the factors of a distributed checkpoint, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.convert.adapter.lazy import LazyModules
from bdlora_megatron.convert.adapter.neutral import (
    BaseShape,
    ModuleKey,
    blocked_factor,
    infer_base_shape,
)
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.rows import in_file_order
from bdlora_megatron.convert.megatron.dist_tensors import DistTensors
from bdlora_megatron.convert.megatron.names import parse_factor, split_fused
from bdlora_megatron.decoder import ModuleName, Numbering, facts_of, parts_of
from bdlora_megatron.errors import AdapterFormatError, ShapeError

__all__ = ["Pair", "PairSettings", "find_pairs", "pair_modules"]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Pair:
    """One pair of factors in a checkpoint.

    Attributes:
        layer: Its decoder layer.
        linear: The Megatron-Core layer.
        part: The projection in it; empty for the only one, or for all of a fused layer.
        stacked: It is a slice of a tensor that holds all layers.
        names: The tensors that are A and B; of B whose stretches of rows are tensors of their own,
            what their names begin with.
        numbering: How the model numbers its layers.
    """

    layer: int
    linear: str
    part: str
    stacked: bool
    names: tuple[str, str]
    numbering: Numbering = "pairs"

    @property
    def parts(self) -> Mapping[str, ModuleName]:
        """The projections of its layer."""
        parts = parts_of(self.linear, self.numbering)
        assert parts is not None, "parse_factor has refused it"
        return parts

    @property
    def keys(self) -> list[ModuleKey]:
        """The modules it updates."""
        parts = self.parts
        names = [parts[self.part]] if self.part in parts else list(parts.values())
        return [ModuleKey(layer=self.layer, name=name) for name in names]

    @property
    def stretches(self) -> tuple[str, ...]:
        """The stretches of B's rows that are tensors of their own."""
        return facts_of(self.keys[0].name)[1].stretches

    @property
    def b_names(self) -> list[str]:
        """The tensors that are B."""
        name = self.names[1]
        return [f"{name}.{stretch}" for stretch in self.stretches] or [name]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings:
    """What of a pair its tensors don't tell."""

    num_blocks: int
    scale: float


def find_pairs(
    tensors: DistTensors,
    problems: Problems,
    *,
    ignore: Callable[[str], bool],
    numbering: Numbering = "pairs",
) -> list[Pair]:
    """Find all pairs of factors, in the order of their modules.

    Args:
        tensors: The checkpoint.
        problems: Gets whatever is no factor, and factors without the other.
        ignore: Whether a tensor is of no interest, by its name.
        numbering: How the model that saved it numbers its layers.
    """
    found, whole = _found(tensors, problems, ignore, numbering)
    pairs = []
    for (layer, linear, part, stacked), names in sorted(found.items()):
        if len(names) < 2:
            problems.add("one factor of a pair is missing; save the adapter again", *names.values())
            continue
        both = (names["A"], names["B"])
        pair = Pair(
            layer=layer, linear=linear, part=part, stacked=stacked, names=both, numbering=numbering
        )
        missing = sorted(set(pair.b_names) - whole)
        if missing:
            problems.add(_unknown_rows(pair), *missing)
            continue
        pairs.append(pair)
    _check_once(pairs, problems)
    return pairs


def _found(
    tensors: DistTensors,
    problems: Problems,
    ignore: Callable[[str], bool],
    numbering: Numbering,
) -> tuple[dict[tuple[int, str, str, bool], dict[str, str]], set[str]]:
    """The names of A and B by the place of their pair, and the names of all factors' tensors."""
    found: dict[tuple[int, str, str, bool], dict[str, str]] = {}
    whole, prefixes = set(), set()
    for name, fact in tensors.facts.items():
        if ignore(name):
            continue
        parsed = parse_factor(name, numbering)
        if parsed is None:
            problems.add(_leftover(name), name)
            continue
        if fact is None or fact.dim() != (3 if parsed.layer is None else 2):
            problems.add("factors are no matrices of F64, F32, F16 or BF16", name)
            continue
        prefixes.add(parsed.prefix)
        stacked = parsed.layer is None
        for layer in range(fact.shape[0]) if parsed.layer is None else [parsed.layer]:
            place = (layer, parsed.linear, parsed.part, stacked)
            own = name.removesuffix(f".{parsed.stretch}") if parsed.stretch else name
            found.setdefault(place, {})[parsed.factor] = own
            whole.add(name)
    if len(prefixes) > 1:
        problems.add("several models are adapted, wanted one; split the checkpoint", *prefixes)
    if not found:
        problems.add("there are no adapter tensors of decoder layers; save the adapted model")
    return found, whole


def pair_modules(
    tensors: DistTensors,
    settings: Mapping[Pair, PairSettings],
    base: BaseShape,
    problems: Problems,
    *,
    subject: str,
    reorder: Callable[[Pair, Tensor], Tensor] = lambda _, B: B,
) -> tuple[LazyModules, BaseShape]:
    """The modules of a checkpoint's pairs, and the widths they tell.

    Args:
        tensors: The checkpoint.
        settings: Every pair, with its settings.
        base: The base model's heads, for pairs that serve a fused layer.
        problems: Gets pairs that are no update, and disagreements about the base model.
        subject: What fails where a module is broken.
        reorder: Puts the rows of a pair's B right, where its writer permutes them.

    Returns:
        The modules, and the base shape inferred from them.
    """
    facts: dict[ModuleKey, BlockFactors] = {}
    owner: dict[ModuleKey, Pair] = {}
    for pair, setting in settings.items():
        A, *rows = (_meta(tensors, pair, name) for name in (pair.names[0], *pair.b_names))
        try:
            for key, factors in _updates(pair, setting, A, [reorder(pair, B) for B in rows], base):
                facts[key], owner[key] = factors, pair
        except (AdapterFormatError, ShapeError) as error:
            problems.add(str(error), *map(str, pair.keys))
    try:
        widths = infer_base_shape((k, f.in_features, f.out_features) for k, f in facts.items())
    except ShapeError as error:
        problems.add(str(error))
        widths = BaseShape()

    def load(key: ModuleKey) -> BlockFactors:
        pair = owner[key]
        layer = pair.layer if pair.stacked else None
        A, *rows = (tensors.load(name, layer) for name in (pair.names[0], *pair.b_names))
        ordered = [reorder(pair, B) for B in rows]
        return dict(_updates(pair, settings[pair], A, ordered, base))[key]

    return LazyModules(dict(sorted(facts.items())), load, subject=subject), widths


def _updates(
    pair: Pair, setting: PairSettings, A: Tensor, rows: Sequence[Tensor], base: BaseShape
) -> Iterator[tuple[ModuleKey, BlockFactors]]:
    update = BlockFactors(
        A=A,
        B=rows[0] if len(rows) == 1 else torch.cat(list(rows)),
        num_blocks=setting.num_blocks,
        blocked=blocked_factor(pair.keys[0].name),
        scale=setting.scale,
        parts=tuple(len(part) for part in rows) if len(rows) > 1 else (),
    )
    if pair.part not in pair.parts:
        yield from split_fused(pair.linear, pair.keys, update, base)
    else:
        yield pair.keys[0], in_file_order(update, _groups(pair, base))


def _groups(pair: Pair, base: BaseShape) -> int:
    """Groups by which Hugging Face interleaves the stretches of a pair's rows.

    Raises:
        AdapterFormatError: They are the delta net's key heads, and the base model's are unknown.
    """
    if facts_of(pair.keys[0].name)[0].parent != "linear_attn":
        return 1
    if base.delta_heads is None:
        raise AdapterFormatError(
            "the delta net's rows stand by key head in other formats, and how many there are is "
            "unknown; pass base=BaseShape(delta_heads=...)"
        )
    return base.delta_heads


def _meta(tensors: DistTensors, pair: Pair, name: str) -> Tensor:
    fact = tensors.facts[name]
    assert fact is not None, "find_pairs has refused it"
    return fact[0] if pair.stacked else fact


def _check_once(pairs: list[Pair], problems: Problems) -> None:
    seen: set[ModuleKey] = set()
    for pair in pairs:
        for key in pair.keys:
            if key in seen:
                problems.add("modules are updated twice, fused and by themselves", str(key))
            seen.add(key)


def _unknown_rows(pair: Pair) -> str:
    if pair.part not in pair.parts:
        return (
            f"one pair of factors for all of {pair.linear}, which no other format has a place for"
        )
    return (
        f"B of {pair.linear} is not stored by {', '.join(pair.stretches)}, so the order of its "
        "rows depends on the tensor-parallel size that saved it; save it with save_adapter"
    )


def _leftover(name: str) -> str:
    if ".adapter." in name:
        return "adapter tensors that are no factors of the seven projections"
    return "tensors that are no adapter's, which would be lost; save the adapter's tensors alone"
