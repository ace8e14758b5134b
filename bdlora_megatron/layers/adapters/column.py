"""Adapters beside a column-parallel layer, one class per layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from bdlora_megatron.config import Layout
from bdlora_megatron.layers.adapters.base import (
    Adapter,
    AdapterOptions,
    ProjectionPlan,
    block_diagonal,
    tied_replica,
)
from bdlora_megatron.layers.adapters.checks import check_blocks, check_divides, check_layout
from bdlora_megatron.layers.adapters.products import Block, add_blocks
from bdlora_megatron.layers.factors import FactorShape
from bdlora_megatron.layers.geometry import LayerGeometry

__all__ = ["ColumnAdapter", "HalfShardedColumnAdapter", "SLoRAColumnAdapter", "column_adapter"]


class ColumnAdapter(Adapter):
    """BD-LoRA beside a column-parallel layer: A dense, B block-diagonal.

    ``Y_i = X W_i^T + s * (X A_i^T) B_ii^T`` on rank i.

    Collectives: none, forward or backward. The gradient of X is a partial sum, like the base's; the
    layer reduces both at once.
    """

    def __init__(
        self,
        plans: Sequence[ProjectionPlan],
        options: AdapterOptions,
        *,
        in_features: int,
        geometry: LayerGeometry,
    ) -> None:
        super().__init__(plans, options)
        self.in_features = in_features
        self.geometry = geometry

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_blocks(plan, self.tp_size, plan.projection.out_features, "out_features")
        O, R, N = plan.projection.out_features, plan.rank, plan.num_blocks
        return (
            FactorShape(rows=R, columns=self.in_features, shard_dim=0),
            FactorShape(rows=O, columns=R // N, shard_dim=0, parts=plan.projection.parts),
        )

    def shrink_weight(self) -> Tensor:
        """All projections' A, one below the other: ``[K / P, I]``."""
        weights: list[Tensor] = [self.factors(plan)[0]() for plan in self.plans]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def expand_weight(self) -> Tensor:
        """All projections' B in the layer's own row order, ``[O / P, K / P]``.

        A projection's rows meet its own columns only; everything else is zero.
        """
        placed = self._place_columns([self.laid_out(plan) for plan in self.plans])
        return self._place_rows(placed)

    def laid_out(self, plan: ProjectionPlan) -> Tensor:
        """One projection's local B as a plain matrix, with its scale if it is folded in."""
        return self.lay_out_b(plan, self.scaled(self.factors(plan)[1](), plan))

    def lay_out_b(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """A local B with its local blocks on the diagonal: ``[O / P, R / P]``."""
        blocks = self.local_blocks(plan)
        if blocks == 1:
            return weight
        _, shape = self.factor_shapes(plan)
        stretches = shape.stretches(weight, share=self.tp_size)
        return torch.cat([block_diagonal(rows, blocks) for rows in stretches])

    def local_blocks(self, plan: ProjectionPlan) -> int:
        """Diagonal blocks of a projection's local B."""
        return plan.num_blocks // self.tp_size

    def add_product(self, base: Tensor, z: Tensor) -> Tensor:
        """``base + s * z B^T`` on ``[S, b, O / P]`` and ``[T, K / P]``, block by block."""
        # Interleaved by several groups, a projection's rows are too many blocks.
        if self.geometry.local_groups(self.tp_size) > 1:
            return super().add_product(base, z)
        return add_blocks(base, self.by_projection(z), list(self._blocks()))

    def by_projection(self, z: Tensor) -> Tensor:
        """Columns of the rank, one projection's after another's."""
        return z

    def _blocks(self) -> Iterator[Block]:
        """Every block of the local B's, with its place in the layer's rows and in the rank."""
        tops, top = {}, 0
        for projection in self.geometry.projections:
            tops[projection.name] = top
            top += projection.out_features // self.tp_size
        left = 0
        for plan in self.plans:
            weight: Tensor = self.factors(plan)[1]()
            _, shape = self.factor_shapes(plan)
            count, top = self.local_blocks(plan), tops[plan.projection.name]
            # Autograd would copy what a single piece is cut from.
            whole = (weight,)
            for stretch in shape.stretches(weight, share=self.tp_size) if shape.parts else whole:
                for number, rows in enumerate(stretch.chunk(count) if count > 1 else (stretch,)):
                    yield Block(top, left + number * weight.size(1), plan.scale, rows)
                    top += len(rows)
            left += count * weight.size(1)

    def scaled(self, weight: Tensor, plan: ProjectionPlan) -> Tensor:
        """Fold the projection's scale into its B, unless one scale serves the whole layer."""
        return weight if self.scale is not None else weight * plan.scale

    def rank_chunks(self) -> int:
        """How many ranks' columns stand side by side in ``expand_weight``."""
        return 1

    def _place_columns(self, pieces: list[Tensor]) -> list[Tensor]:
        """Pad each piece with zero columns where the other projections' ranks stand."""
        if len(pieces) == 1:
            return pieces
        chunks = self.rank_chunks()
        widths = [piece.size(1) // chunks for piece in pieces]
        total, offset, placed = sum(widths), 0, []
        for piece, width in zip(pieces, widths, strict=True):
            wide = piece.view(-1, chunks, width)
            wide = F.pad(wide, (offset, total - offset - width))
            placed.append(wide.reshape(-1, chunks * total))
            offset += width
        return placed

    def _place_rows(self, pieces: list[Tensor]) -> Tensor:
        """Interleave the projections' rows by group, with zero rows for those that have no pair."""
        if len(self.geometry.projections) == 1:
            return pieces[0]
        groups = self.geometry.local_groups(self.tp_size)
        by_name = {p.projection.name: t for p, t in zip(self.plans, pieces, strict=True)}
        columns = pieces[0].size(1)
        rows = []
        for projection in self.geometry.projections:
            piece = by_name.get(projection.name)
            if piece is None:
                piece = pieces[0].new_zeros(projection.out_features // self.tp_size, columns)
            rows.append(piece.view(groups, -1, columns))
        return torch.cat(rows, dim=1).reshape(-1, columns)


class SLoRAColumnAdapter(ColumnAdapter):
    """S-LoRA beside a column-parallel layer: A split on the rank, B on the output.

    Collectives: forward one all-gather of ``[K, T]``, shared by all projections of the layer;
    backward one reduce-scatter of the same.
    """

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_divides(plan.rank, self.tp_size, "rank")
        check_divides(plan.projection.out_features, self.tp_size, "out_features")
        return (
            FactorShape(rows=plan.rank, columns=self.in_features, shard_dim=0),
            FactorShape(
                rows=plan.projection.out_features,
                columns=plan.rank,
                shard_dim=0,
                parts=plan.projection.parts,
            ),
        )

    def local_blocks(self, plan: ProjectionPlan) -> int:
        """Local B has no blocks: ``[O / P, R]``."""
        del plan
        return 1

    def rank_chunks(self) -> int:
        """The gather puts the ranks' columns side by side."""
        return self.tp_size

    def by_projection(self, z: Tensor) -> Tensor:
        """Each rank's columns hold a part of every projection's."""
        if len(self.plans) == 1:
            return z
        widths = [plan.rank // self.tp_size for plan in self.plans]
        # As rows, in which form it was gathered.
        parts = z.t().unflatten(0, (self.tp_size, -1)).split(widths, dim=1)
        return torch.cat([part.flatten(0, 1) for part in parts]).t()

    def exchange(self, z: Tensor) -> Tensor:
        """All-gather of ``[T, K / P]`` to ``[T, K]``."""
        # Gathering the transpose makes the ranks' parts contiguous: no copy after the gather.
        gathered: Tensor = gather_from_sequence_parallel_region(
            z.t().contiguous(), tensor_parallel_output_grad=True, group=self.tp_group
        )
        return gathered.t()

    def whole_weights(self) -> tuple[Tensor, Tensor]:
        """All ranks' A, and local B."""
        A = gather_from_sequence_parallel_region(self.shrink_weight(), group=self.tp_group)
        return A, self.expand_weight()


class HalfShardedColumnAdapter(ColumnAdapter):
    """Vanilla LoRA beside a column-parallel layer with A whole on every rank.

    Collectives: forward none; backward one all-reduce of the gradient of all projections' A.
    """

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_divides(plan.projection.out_features, self.tp_size, "out_features")
        return (
            FactorShape(rows=plan.rank, columns=self.in_features, shard_dim=None),
            FactorShape(
                rows=plan.projection.out_features,
                columns=plan.rank,
                shard_dim=0,
                parts=plan.projection.parts,
            ),
        )

    def shrink_weight(self) -> Tensor:
        """All projections' whole A: ``[K, I]``."""
        return tied_replica(super().shrink_weight(), self.tp_group)

    def local_blocks(self, plan: ProjectionPlan) -> int:
        """Local B has no blocks: ``[O / P, R]``."""
        del plan
        return 1


_LAYOUTS = {
    Layout.BDLORA: ColumnAdapter,
    Layout.SLORA: SLoRAColumnAdapter,
    Layout.HALF_SHARDED: HalfShardedColumnAdapter,
}


def column_adapter(
    layout: Layout,
    plans: Sequence[ProjectionPlan],
    options: AdapterOptions,
    *,
    in_features: int,
    geometry: LayerGeometry,
) -> ColumnAdapter:
    """Make an adapter for a column-parallel layer, without factors until it is built.

    Args:
        layout: How ranks split the factors.
        plans: The projections that get a pair of factors; the others are left as they are.
        options: Dropout, type, device and group.
        in_features: Input size I.
        geometry: All projections of the layer and their row order.

    Returns:
        The adapter; ``build`` makes its factors.

    Raises:
        ConfigError: Blocks, rank or features do not divide as the layout needs.
    """
    check_layout(layout, plans)
    return _LAYOUTS[layout](plans, options, in_features=in_features, geometry=geometry)
