"""Pairing the factors of a distributed checkpoint, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
from bdlora_megatron.convert.megatron.dist_tensors import DistTensors
from bdlora_megatron.convert.megatron.names import parse_factor, split_fused
from bdlora_megatron.decoder import FUSED, PARTS
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
        names: The tensors that are A and B.
    """

    layer: int
    linear: str
    part: str
    stacked: bool
    names: tuple[str, str]

    @property
    def keys(self) -> list[ModuleKey]:
        """The modules it updates."""
        parts = PARTS[self.linear]
        names = [parts[self.part]] if self.part in parts else list(parts.values())
        return [ModuleKey(layer=self.layer, name=name) for name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings:
    """What of a pair its tensors don't tell."""

    num_blocks: int
    scale: float


def find_pairs(
    tensors: DistTensors, problems: Problems, *, ignore: Callable[[str], bool]
) -> list[Pair]:
    """Find all pairs of factors, in the order of their modules.

    Args:
        tensors: The checkpoint.
        problems: Gets whatever is no factor, and factors without the other.
        ignore: Whether a tensor is of no interest, by its name.

    Returns:
        The pairs.
    """
    found: dict[tuple[int, str, str, bool], dict[str, str]] = {}
    prefixes = set()
    for name, fact in tensors.facts.items():
        if ignore(name):
            continue
        parsed = parse_factor(name)
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
            found.setdefault(place, {})[parsed.factor] = name
    if len(prefixes) > 1:
        problems.add("several models are adapted, wanted one; split the checkpoint", *prefixes)
    if not found:
        problems.add("there are no adapter tensors of decoder layers; save the adapted model")
    pairs = []
    for (layer, linear, part, stacked), names in sorted(found.items()):
        if len(names) < 2:
            problems.add("one factor of a pair is missing; save the adapter again", *names.values())
            continue
        both = (names["A"], names["B"])
        pairs.append(Pair(layer=layer, linear=linear, part=part, stacked=stacked, names=both))
    _check_once(pairs, problems)
    return pairs


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
        A, B = (_meta(tensors, pair, name) for name in pair.names)
        try:
            for key, factors in _updates(pair, setting, (A, reorder(pair, B)), base):
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
        A, B = (tensors.load(name, layer) for name in pair.names)
        return dict(_updates(pair, settings[pair], (A, reorder(pair, B)), base))[key]

    return LazyModules(dict(sorted(facts.items())), load, subject=subject), widths


def _updates(
    pair: Pair, setting: PairSettings, factors: tuple[Tensor, Tensor], base: BaseShape
) -> Iterator[tuple[ModuleKey, BlockFactors]]:
    update = BlockFactors(
        A=factors[0],
        B=factors[1],
        num_blocks=setting.num_blocks,
        blocked=blocked_factor(pair.keys[0].name),
        scale=setting.scale,
    )
    if pair.linear in FUSED and not pair.part:
        yield from split_fused(pair.linear, pair.layer, update, base)
    else:
        yield pair.keys[0], update


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


def _leftover(name: str) -> str:
    if ".adapter." in name:
        return "adapter tensors that are no factors of the seven projections"
    return "tensors that are no adapter's, which would be lost; save the adapter's tensors alone"
