"""Whether two adapters compute the same, told from their factors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bdlora_megatron.blocks import BlockFactors, output_distances, output_norms, update_norm
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.neutral import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.problems import Problems
from bdlora_megatron.convert.adapter.tables import format_table

__all__ = ["Comparison", "ModuleDifference", "compare_adapters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleDifference:
    """How far the two updates of one module are apart.

    Attributes:
        key: The module. One that an adapter lacks has the update 0 there.
        norm: Frobenius norm of the larger update.
        difference: Frobenius norm of the difference; exactly 0 where the factors are equal.
        worst_output: The most that an input of norm 1 can move one output apart.
    """

    key: ModuleKey
    norm: float
    difference: float
    worst_output: float

    @property
    def relative(self) -> float:
        """`difference` over `norm`; 0 where both updates are 0."""
        return self.difference / self.norm if self.norm > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two adapters, module by module.

    Attributes:
        first: Name of one.
        second: Name of the other.
        invocation_tokens: From which tokens on each of them acts; None is every token.
        modules: Every module that either has, in order.
    """

    first: str
    second: str
    invocation_tokens: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    modules: tuple[ModuleDifference, ...]

    @property
    def largest(self) -> ModuleDifference:
        """The module with the largest relative difference."""
        return max(self.modules, key=lambda module: module.relative)

    @property
    def acts_alike(self) -> bool:
        """Whether both act on the same tokens of every text."""
        return self.invocation_tokens[0] == self.invocation_tokens[1]

    def is_same(self, tolerance: float) -> bool:
        """Whether no module differs by more, and both act on the same tokens.

        Returns:
            True if they compute the same, within the tolerance.
        """
        return self.acts_alike and all(module.relative <= tolerance for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON takes it."""
        modules = [
            {**asdict(module), "key": str(module.key), "relative": module.relative}
            for module in self.modules
        ]
        return {
            "first": self.first,
            "second": self.second,
            "invocation_tokens": list(self.invocation_tokens),
            "largest_relative": self.largest.relative,
            "modules": modules,
        }

    def table(self) -> str:
        """The comparison for people."""
        rows = [
            (
                str(module.key),
                f"{module.norm:.4g}",
                f"{module.difference:.3g}",
                f"{module.relative:.3g}",
                f"{module.worst_output:.3g}",
            )
            for module in self.modules
        ]
        header = ("module", "norm", "difference", "relative", "worst output")
        return format_table(header, rows)


def compare_adapters(first: Adapter, second: Adapter) -> Comparison:
    """Measure the difference of two adapters' updates in fp64, without forming them.

    Block counts, ranks, scales and types may differ. One module of each is in memory at a time.

    Raises:
        AdapterFormatError: If the two are not of one base model: modules differ in their widths.
            All of them are listed.
    """
    _check_shapes(first, second)
    keys = sorted(first.modules.keys() | second.modules.keys())
    return Comparison(
        first=first.name,
        second=second.name,
        invocation_tokens=(first.invocation_tokens, second.invocation_tokens),
        modules=tuple(_difference(key, first.modules, second.modules) for key in keys),
    )


def _check_shapes(first: Adapter, second: Adapter) -> None:
    facts, others = module_facts(first), module_facts(second)
    problems = Problems()
    for key in facts.keys() & others.keys():
        shapes = [[f.out_features, f.in_features] for f in (facts[key], others[key])]
        if shapes[0] != shapes[1]:
            problems.add(
                f"one update is [out, in] = {shapes[0]}, the other {shapes[1]}; wanted two "
                "adapters of one base model",
                str(key),
            )
    problems.raise_if_any(f"cannot compare {first.name!r} and {second.name!r}")


def _difference(
    key: ModuleKey,
    first: Mapping[ModuleKey, BlockFactors],
    second: Mapping[ModuleKey, BlockFactors],
) -> ModuleDifference:
    pair = [modules[key] for modules in (first, second) if key in modules]
    norm = max(update_norm(factors) for factors in pair)
    outputs = output_distances(*pair) if len(pair) == 2 else output_norms(pair[0])
    return ModuleDifference(
        key=key,
        norm=norm,
        difference=outputs.norm().item(),
        worst_output=outputs.max().item(),
    )
