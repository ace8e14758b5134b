"""Megatron-Core's column- and row-parallel linear layers with an adapter inside.

Both override one method, ``_forward_impl``, the matrix product that Megatron-Core calls between its
input and output communication. What stands there is computed on what the base layer communicates
anyway, so BD-LoRA adds no collective of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from bdlora_megatron.config import Layout
from bdlora_megatron.layers.adapters import (
    Adapter,
    AdapterOptions,
    ProjectionPlan,
    column_adapter,
    row_adapter,
)
from bdlora_megatron.layers.geometry import LayerGeometry
from bdlora_megatron.layers.lora_linear import LoRALinear

__all__ = ["LoRAColumnParallelLinear", "LoRARowParallelLinear"]


class LoRAColumnParallelLinear(LoRALinear, ColumnParallelLinear):
    """A ``ColumnParallelLinear`` whose product includes an adapter's.

    ``Y_i = X W_i^T + s * (X A_i^T) B_ii^T`` on rank i.

    | tensor | local shape |
    |---|---|
    | X | ``[S, b, I]``; ``[S / P, b, I]`` under sequence parallelism |
    | W_i | ``[O / P, I]`` |
    | A_i, B_ii | ``[R / P, I]``, ``[O / P, R / N]`` (BD-LoRA) |
    | Y_i | ``[S, b, O / P]`` |

    Collectives: those of the base layer, no more: backward one all-reduce of dX; under sequence
    parallelism, forward one all-gather of X and backward one reduce-scatter of dX. With
    ``regather_input``, backward one all-gather more.
    """

    base_class = ColumnParallelLinear
    splits_input = False

    def _make_adapter(
        self,
        layout: Layout,
        plans: Sequence[ProjectionPlan],
        options: AdapterOptions,
        geometry: LayerGeometry,
    ) -> Adapter:
        return column_adapter(
            layout, plans, options, in_features=self.input_size, geometry=geometry
        )

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._runs_adapters():
            plain: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return plain
        own = {name: kwargs.pop(name) for name in ("allreduce_dgrad", "sequence_parallel")}
        kwargs.update(allreduce_dgrad=False, sequence_parallel=False)
        shared, add = self._share_input(input, **own)
        return add(super()._forward_impl(shared, weight, *args, **kwargs))


class LoRARowParallelLinear(LoRALinear, RowParallelLinear):
    """A ``RowParallelLinear`` whose product includes an adapter's.

    ``Y = sum_i (X_i W_i^T + s * (X_i A_ii^T) B_i^T)``: each rank adds its adapter product to its
    partial sum, and the base layer's one reduction sums both.

    | tensor | local shape |
    |---|---|
    | X_i | ``[S, b, I / P]`` |
    | W_i | ``[O, I / P]`` |
    | A_ii, B_i | ``[R / P, I / N]``, ``[O, R / P]`` (BD-LoRA) |
    | Y | ``[S, b, O]``; ``[S / P, b, O]`` under sequence parallelism |

    Collectives: those of the base layer, no more: forward one all-reduce of Y, or one
    reduce-scatter under sequence parallelism, whose backward is one all-gather.
    """

    base_class = RowParallelLinear
    splits_input = True

    def _make_adapter(
        self,
        layout: Layout,
        plans: Sequence[ProjectionPlan],
        options: AdapterOptions,
        geometry: LayerGeometry,
    ) -> Adapter:
        return row_adapter(
            layout,
            plans,
            options,
            in_features=self.input_size,
            out_features=self.output_size,
        )

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return self._add_to(base, input)
