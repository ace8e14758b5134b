"""Adapters beside a row-parallel layer, one class per layout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
)
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
from bdlora_megatron.layers.factors import FactorShape

__all__ = ["HalfShardedRowAdapter", "RowAdapter", "SLoRARowAdapter", "row_adapter"]


class RowAdapter(Adapter):
    """BD-LoRA beside a row-parallel layer: A block-diagonal, B dense.

    ``P_i = X_i W_i^T + s * (X_i A_ii^T) B_i^T`` on rank i, before the base layer's reduction.

    Collectives: none, forward or backward; the base layer's one reduction sums both products.
    """

    def __init__(
        self,
        plans: Sequence[ProjectionPlan],
        options: AdapterOptions,
        *,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__(plans, options)
        (self.only,) = self.plans
        self.in_features = in_features
        self.out_features = out_features

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_blocks(plan, self.tp_size, self.in_features, "in_features")
        I, R, N = self.in_features, plan.rank, plan.num_blocks
        return (
            FactorShape(rows=R, columns=I // N, shard_dim=0),
            FactorShape(rows=self.out_features, columns=R, shard_dim=1),
        )

    def shrink_weight(self) -> Tensor:
        """Local A as a plain matrix."""
        return self.lay_out_a(self.only, self.factors(self.only)[0]())

    def lay_out_a(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """A local A with its local blocks on the diagonal: ``[R / P, I / P]``."""
        return block_diagonal(weight, plan.num_blocks // self.tp_size)

    def expand_weight(self) -> Tensor:
        """Local B: ``[O, R / P]``."""
        weight: Tensor = self.factors(self.only)[1]()
        return weight

    def dropout_rng(self) -> AbstractContextManager[None]:
        """Megatron's model-parallel stream: each rank sees other elements of X, so other masks."""
        if self.tp_size == 1:
            return nullcontext()
        fork: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return fork


class SLoRARowAdapter(RowAdapter):
    """S-LoRA beside a row-parallel layer: A split on the input, B on the output.

    Each rank adds its slice of the output to its partial sum, so that the gather of the slices
    rides the base layer's own reduction.

    Collectives: forward one all-reduce of ``[T, R]``; backward one all-reduce of the same.
    """

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_divides(self.out_features, self.tp_size, "out_features")
        return (
            FactorShape(rows=plan.rank, columns=self.in_features, shard_dim=1),
            FactorShape(rows=self.out_features, columns=plan.rank, shard_dim=0),
        )

    def lay_out_a(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """Local A has no blocks: ``[R, I / P]``."""
        del plan
        return weight

    def exchange(self, z: Tensor) -> Tensor:
        """All-reduce of ``[T, R]``, and of its gradient in backward."""
        summed = reduce_from_tensor_model_parallel_region(z, group=self.tp_group)
        out: Tensor = copy_to_tensor_model_parallel_region(summed, group=self.tp_group)
        return out

    def first_row(self) -> int:
        """This rank's slice of the product goes to its own slice of the partial sum."""
        rank: int = self.tp_group.rank()
        return rank * (self.out_features // self.tp_size)

    def whole_weights(self) -> tuple[Tensor, Tensor]:
        """Local A, and all ranks' B."""
        B = gather_from_sequence_parallel_region(self.expand_weight(), group=self.tp_group)
        return self.shrink_weight(), B


class HalfShardedRowAdapter(RowAdapter):
    """Vanilla LoRA beside a row-parallel layer with B whole on every rank.

    Collectives: forward none; backward one all-reduce of the gradient of B.
    """

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        check_divides(self.in_features, self.tp_size, "in_features")
        return (
            FactorShape(rows=plan.rank, columns=self.in_features, shard_dim=1),
            FactorShape(rows=self.out_features, columns=plan.rank, shard_dim=None),
        )

    def lay_out_a(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """Local A has no blocks: ``[R, I / P]``."""
        del plan
        return weight

    def expand_weight(self) -> Tensor:
        """Whole B: ``[O, R]``."""
        return tied_replica(super().expand_weight(), self.tp_group)


_LAYOUTS = {
    Layout.BDLORA: RowAdapter,
    Layout.SLORA: SLoRARowAdapter,
    Layout.HALF_SHARDED: HalfShardedRowAdapter,
}


def row_adapter(
    layout: Layout,
    plans: Sequence[ProjectionPlan],
    options: AdapterOptions,
    *,
    in_features: int,
    out_features: int,
) -> RowAdapter:
    """Make an adapter for a row-parallel layer, without factors until it is built.

    Returns:
        The adapter; ``build`` makes its factors.

    Raises:
        ConfigError: Blocks, rank or features do not divide as the layout needs.
    """
    check_layout(layout, plans)
    return _LAYOUTS[layout](plans, options, in_features=in_features, out_features=out_features)
