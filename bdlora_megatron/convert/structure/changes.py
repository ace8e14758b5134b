"""What a change of structure did to an adapter, module by module."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bdlora_megatron.blocks import BlockFactors, output_distances, update_norm
from bdlora_megatron.convert.adapter import ModuleKey
from bdlora_megatron.convert.adapter.tables import format_bytes, format_table

__all__ = ["ModuleChange", "StructureReport", "measure", "whole_error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleChange:
    """One module before and after.

    Attributes:
        key: The module.
        rank_before: Total rank that it had.
        rank: Total rank that it has.
        num_blocks_before: Blocks that it had.
        num_blocks: Blocks that it has.
        bytes_before: Size of both factors, over all tensor-parallel ranks.
        bytes: Likewise, after.
        norm: Frobenius norm of the update before; None where nothing can be lost.
        error: Frobenius norm of what was lost, over `norm`. Measured in fp64 on the factors as
            they are written, so rounding to their type is part of it.
    """

    key: ModuleKey
    rank_before: int
    rank: int
    num_blocks_before: int
    num_blocks: int
    bytes_before: int
    bytes: int
    norm: float | None
    error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureReport:
    """All modules of an adapter before and after.

    Attributes:
        adapter: The adapter's name.
        mode: The structure that was asked for.
        modules: Every module, in order.
        invocation_tokens: From which tokens on it acts, before and after; None for every token.
    """

    adapter: str
    mode: str
    modules: tuple[ModuleChange, ...]
    invocation_tokens: tuple[int, ...] | None = None

    @property
    def error(self) -> float:
        """Relative error of the whole adapter, all updates taken as one long vector."""
        return whole_error([(change.norm or 0.0, change.error) for change in self.modules])

    @property
    def bytes_before(self) -> int:
        """Size of all factors before."""
        return sum(change.bytes_before for change in self.modules)

    @property
    def bytes(self) -> int:
        """Size of all factors after."""
        return sum(change.bytes for change in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        modules = [{**asdict(change), "key": str(change.key)} for change in self.modules]
        return {
            "adapter": self.adapter,
            "structure": self.mode,
            "error": self.error,
            "bytes_before": self.bytes_before,
            "bytes": self.bytes,
            "invocation_tokens": self.invocation_tokens and list(self.invocation_tokens),
            "modules": modules,
        }

    def table(self) -> str:
        """The report for people, a line per module and one for the whole."""
        rows = [
            (
                str(change.key),
                f"{change.rank_before} / {change.num_blocks_before}",
                f"{change.rank} / {change.num_blocks}",
                format_bytes(change.bytes),
                f"{change.error:.3g}",
            )
            for change in self.modules
        ]
        rows.append(("whole adapter", "", "", format_bytes(self.bytes), f"{self.error:.3g}"))
        header = ("module", "rank / blocks before", "after", "size", "relative error")
        return format_table(header, rows)


def measure(
    key: ModuleKey,
    before: BlockFactors,
    after: BlockFactors,
    *,
    lossy: bool,
    rounded: BlockFactors | None = None,
) -> ModuleChange:
    """Compare a module before and after.

    Args:
        key: The module.
        before: Its update.
        after: The one that replaces it.
        lossy: Something in this adapter may be lost, so norms are needed.
        rounded: `after` as it will be written, where that is another type.

    Returns:
        The comparison; without `lossy` no number is looked at.
    """
    norm, error = None, 0.0
    written = rounded or after
    if lossy:
        norm = update_norm(before)
        lost = output_distances(before, written).norm().item()
        error = lost / norm if norm > 0 else 0.0
    return ModuleChange(
        key=key,
        rank_before=before.rank,
        rank=after.rank,
        num_blocks_before=before.num_blocks,
        num_blocks=after.num_blocks,
        bytes_before=before.num_parameters * before.dtype.itemsize,
        bytes=written.num_parameters * written.dtype.itemsize,
        norm=norm,
        error=error,
    )


def whole_error(modules: list[tuple[float, float]]) -> float:
    """The relative error of several updates taken as one long vector.

    Returns:
        The root of the summed squares of what was lost over that of what there was; 0 if nothing.
    """
    whole = math.hypot(*(norm for norm, _ in modules))
    lost = math.hypot(*(norm * error for norm, error in modules))
    return lost / whole if whole > 0 else 0.0
