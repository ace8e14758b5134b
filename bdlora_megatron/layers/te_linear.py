"""Megatron-Core's Transformer Engine layers with an adapter inside.

Transformer Engine joins a layer's communication and its product in one autograd function, so there
is no method between them to override. Instead the product runs with Transformer Engine's own
communication switched off, as Megatron-Core itself runs it for experts, and the same communication
happens here, once for base and adapter. A layer without an active adapter runs exactly as it was.

Import this only where Transformer Engine is installed; ``layers.classes`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel import (
    get_expert_parallel_rng_tracker_name,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

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
from bdlora_megatron.runtime.versions.layers import share_quantization

__all__ = [
    "TE_CLASSES",
    "LoRATEColumnParallelLinear",
    "LoRATELayerNormColumnParallelLinear",
    "LoRATERowParallelLinear",
]

Output = tuple[Tensor, Tensor | None]


class _TELoRALinear(LoRALinear):
    """What the three layers share: Transformer Engine's names for what ``LoRALinear`` asks for."""

    # From Transformer Engine's layers; sizes are this rank's share, unlike Megatron-Core's.
    in_features: int
    out_features: int
    parallel_mode: str | None
    sequence_parallel: bool

    @property
    def is_expert(self) -> bool:  # type: ignore[override]
        """Whether the layer belongs to a mixture-of-experts expert."""
        name = getattr(self, "rng_tracker_name", None)
        return bool(name == get_expert_parallel_rng_tracker_name())

    @property
    def explicit_expert_comm(self) -> bool:  # type: ignore[override]
        """Whether somebody else communicates for this layer, as with overlapped shared experts."""
        return self.parallel_mode is None and self.tp_group.size() > 1

    @contextmanager
    def _without_communication(self, **changes: Any) -> Iterator[None]:
        """Let Transformer Engine compute on what it is given, here and in its backward."""
        changes |= {"parallel_mode": None, "tp_size": 1, "sequence_parallel": False}
        # Communication that overlaps the product would come back through these.
        overlaps = [k for k, v in self.__dict__.items() if k.startswith("ub_") and v is True]
        changes |= dict.fromkeys(overlaps, False)
        before = {name: self.__dict__[name] for name in changes}
        self.__dict__.update(changes)
        try:
            yield
        finally:
            self.__dict__.update(before)


class _TEColumnLike(_TELoRALinear):
    def _share(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """One copy of the input for base and adapters, as ``_share_input`` gives it."""
        return self._share_input(
            x,
            allreduce_dgrad=self.tp_group.size() > 1 and not self.sequence_parallel,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def input_size(self) -> int:  # type: ignore[override]
        """I."""
        return self.in_features

    @property
    def output_size(self) -> int:  # type: ignore[override]
        """O, over all ranks."""
        return self.out_features * int(self.tp_group.size())

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


class LoRATEColumnParallelLinear(_TEColumnLike, TEColumnParallelLinear):
    """A ``TEColumnParallelLinear`` whose product includes an adapter's.

    Mathematics and shapes are those of ``LoRAColumnParallelLinear``.

    Collectives: those of the base layer, no more: backward one all-reduce of dX; under sequence
    parallelism, forward one all-gather of X and backward one reduce-scatter of dX. With
    ``regather_input``, backward one all-gather more.
    """

    base_class = TEColumnParallelLinear
    splits_input = False

    def forward(self, x: Tensor) -> Output:
        """The layer's output and, where it is told not to add it, its bias."""
        if not self._runs_adapters():
            plain: Output = super().forward(x)
            return plain
        shared, add = self._share(x)
        with self._without_communication():
            base, bias = super().forward(shared)
        return add(base), bias


class LoRATELayerNormColumnParallelLinear(_TEColumnLike, TELayerNormColumnParallelLinear):
    """A ``TELayerNormColumnParallelLinear`` whose product includes an adapter's.

    ``Y_i = N W_i^T + s * (N A_i^T) B_ii^T`` with ``N = norm(X)``, which is computed once: on the
    local share of X under sequence parallelism, and gathered afterwards for base and adapter.

    The layer runs as its two halves, a norm and a product. Transformer Engine can return the norm's
    output from the joined layer, but not with a gradient that is right and reduced once: gathered,
    the gradient that comes back through it is dropped from version 2.4 on; not gathered, it wants a
    collective of its own.

    Collectives: as ``LoRATEColumnParallelLinear``.
    """

    base_class = TELayerNormColumnParallelLinear
    splits_input = False
    own_attributes = (*LoRALinear.own_attributes, "_halves")

    def _start_empty(self) -> None:
        super()._start_empty()
        self._halves: tuple[Any, Any] | None = None

    def forward(self, x: Tensor) -> Output:
        """The layer's output and, where it is told not to add it, its bias."""
        if not self._runs_adapters():
            plain: Output = super().forward(x)
            return plain
        norm, linear = self._norm_and_linear()
        shared, add = self._share(norm(x))
        base, bias = linear(shared)
        self.is_first_microbatch = False
        return add(base), bias

    def _norm_and_linear(self) -> tuple[Any, Any]:
        """The two halves, on this layer's own parameters."""
        if self._halves is None:
            # A tuple, so that torch does not register them: the parameters would appear twice.
            self._halves = self._make_halves()
        norm, linear = self._halves
        norm._parameters["weight"] = self.layer_norm_weight
        if self.layer_norm_bias is not None:
            norm._parameters["bias"] = self.layer_norm_bias
        linear._parameters["weight"] = self.weight
        if self.use_bias:
            linear._parameters["bias"] = self.bias
        linear.training = self.training
        share_quantization(self, linear)
        linear.is_first_microbatch = self.is_first_microbatch
        return norm, linear

    def _make_halves(self) -> tuple[Any, Any]:
        config = copy.copy(self.config)
        config.use_cpu_initialization = False
        # No memory for parameters: this layer's own take their place.
        config.init_model_with_meta_device = True
        # Between two local operations there is nothing to overlap.
        config.tp_comm_overlap = False
        config.delay_wgrad_compute = False
        norm = TENorm(config, self.in_features, config.layernorm_epsilon)
        linear = TELinear(
            self.in_features,
            self.out_features,
            parallel_mode="duplicated",
            config=config,
            init_method=nn.init.zeros_,
            bias=self.use_bias,
            skip_bias_add=self.te_return_bias,
            skip_weight_param_allocation=False,
        )
        return norm, linear


class LoRATERowParallelLinear(_TELoRALinear, TERowParallelLinear):
    """A ``TERowParallelLinear`` whose product includes an adapter's.

    Mathematics and shapes are those of ``LoRARowParallelLinear``.

    Collectives: those of the base layer, no more: forward one all-reduce of Y, or one
    reduce-scatter under sequence parallelism, whose backward is one all-gather.
    """

    base_class = TERowParallelLinear
    splits_input = True

    @property
    def input_size(self) -> int:  # type: ignore[override]
        """I, over all ranks."""
        return self.in_features * int(self.tp_group.size())

    @property
    def output_size(self) -> int:  # type: ignore[override]
        """O."""
        return self.out_features

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

    def forward(self, x: Tensor) -> Output:
        """The layer's output and, where it is told not to add it, its bias."""
        if not self._runs_adapters():
            plain: Output = super().forward(x)
            return plain
        # The bias belongs to the whole sum, not to every rank's part of it.
        with self._without_communication(apply_bias=False, gemm_bias_unfused_add=False):
            part, bias = super().forward(x)
        reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        y = reduce(self._add_to(part, x), group=self.tp_group)
        return y + self.bias if self.apply_bias else y, bias


TE_CLASSES: dict[type[nn.Module], type[LoRALinear]] = {
    TEColumnParallelLinear: LoRATEColumnParallelLinear,
    TELayerNormColumnParallelLinear: LoRATELayerNormColumnParallelLinear,
    TERowParallelLinear: LoRATERowParallelLinear,
}
