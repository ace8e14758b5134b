"""The adapters of one layer that are served together, each in a slot of the layer's pools.

Column and row layers run a batch of several adapters as they run one: the grouped product is added
to the base product on what the base layer communicates anyway. BD-LoRA, and vanilla adapters held
as one block per rank, add no collective. Adapters in the S-LoRA layout have pools of their own,
because their ranks meet between the two halves of the product.

Shapes: T tokens, J projections of the layer, I and O input and output features, R an adapter's
rank, P tensor-parallel ranks, Z rank room, M pool rows. Letters mean sizes over all ranks except in
the pools, which are one rank's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from bdlora_megatron.blocks import BlockFactors
from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ShapeError
from bdlora_megatron.layers.adapters import AdapterOptions, ProjectionPlan
from bdlora_megatron.layers.cores import LayerCores
from bdlora_megatron.layers.geometry import LayerGeometry
from bdlora_megatron.layers.pools import (
    LayerCapacity,
    LayerShard,
    Pools,
    exchanged_columns,
    exchanged_parts,
    slot_columns,
)
from bdlora_megatron.ops import (
    GroupedBatch,
    SlotTable,
    add_grouped,
    expand,
    shrink,
)
from bdlora_megatron.ops.grouped import Implementation

__all__ = ["LayerSlots", "ServingStep"]


@dataclass(slots=True)
class ServingStep:
    """What every layer of a model reads in a step; one object for all of them, set once per step.

    Attributes:
        batch: Which slot each token uses; None runs the base model alone.
        own: Whether layers run the pools whose adapters each rank multiplies alone.
        exchange: Whether layers run the S-LoRA pools, with their collectives. The same on every
            rank.
        cores: Which core each token uses; None where no token has any.
        implementation: Of the grouped product, instead of the device's own.
    """

    batch: GroupedBatch | None = None
    own: bool = True
    exchange: bool = False
    cores: GroupedBatch | None = None
    implementation: Implementation | None = None


class LayerSlots:
    """The slots of one tensor-parallel linear layer.

    | tensor | local shape |
    |---|---|
    | pool of A | ``[J M, I]``, row layers ``[M, I / P]``; in the S-LoRA layout ``[J M / P, I]`` |
    | pool of B of a projection | ``[M, O / P]``, row layers ``[M, O]`` |

    Collectives: none for BD-LoRA and half-sharded adapters. Where the step says that S-LoRA
    adapters take part: column layers one all-gather of ``[T, J, Z / P]`` per rank, row layers one
    all-reduce of ``[T, Z]``.
    """

    def __init__(
        self, layer: Any, geometry: LayerGeometry, capacity: LayerCapacity, step: ServingStep
    ) -> None:
        """Make empty pools on the layer's device.

        Args:
            layer: The ``LoRALinear`` that they belong to.
            geometry: Its projections, one pair of factors each.
            capacity: Slots, rows and types.
            step: What all layers of the model read in a step.
        """
        self.geometry = geometry
        self.capacity = capacity
        self.step = step
        self.tp_group = layer.tp_group
        self._layer = layer
        self._column = not layer.splits_input
        own_capacity = capacity if capacity.own else replace(capacity, rows=0)
        self._own = Pools(layer, slot_columns(layer, geometry), own_capacity)
        #: Of adapters that share a basis; see ``serve.cores``.
        self.cores: LayerCores | None = None
        self._exchanged: Pools | None = None
        if capacity.exchanged:
            columns = exchanged_columns(layer, geometry)
            self._exchanged = Pools(layer, columns, capacity, parts=exchanged_parts(layer))

    @property
    def tables(self) -> list[SlotTable]:
        """What slots hold, for ``SlotTables`` to bring to the device."""
        pools = [self._own] if self._exchanged is None else [self._own, self._exchanged]
        return [held.factors.table for held in pools]

    def add_cores(self, *, num_slots: int, max_rank: int) -> LayerCores:
        """Make room for cores.

        Args:
            num_slots: How many.
            max_rank: The largest rank of a basis on one rank.
        """
        self.cores = LayerCores(self._layer, self.geometry, num_slots=num_slots, max_rank=max_rank)
        return self.cores

    def shard(self, modules: Mapping[str, BlockFactors], layout: Layout) -> LayerShard:
        """Cut this rank's shard of an adapter, by the rules of ``layers.adapters``.

        Touches nothing of the layer, so that a thread may call it while the model runs.

        Args:
            modules: The adapter's factors by projection name, already in a form that the ranks can
                shard in ``layout``.
            layout: How ranks split the factors.
        """
        plans = {
            name: ProjectionPlan(
                projection=next(p for p in self.geometry.projections if p.name == name),
                rank=factors.rank,
                num_blocks=factors.num_blocks,
                scale=factors.scale,
            )
            for name, factors in modules.items()
        }
        layer = self._layer
        options = AdapterOptions(
            dropout=0.0, dtype=self.capacity.dtype, like=layer.weight, tp_group=self.tp_group
        )
        rule = layer._make_adapter(layout, list(plans.values()), options, self.geometry)
        # The host's, or meta where only shapes are looked at.
        device = next(iter(modules.values())).A.device
        empty = layer.weight.new_empty(0, self._own.in_features, device=device, dtype=options.dtype)
        a, b, scales = [empty], [], []
        for projection, columns in zip(self.geometry.projections, self._own.columns, strict=True):
            factors = modules.get(projection.name)
            if factors is None:
                a.append(empty)
                b.append(empty.new_empty(0, columns.features))
                scales.append(0.0)
                continue
            local_a, local_b = rule.shard(projection.name, factors.A, factors.B)
            a.append(local_a.to(options.dtype))
            # A copy: a view would keep the whole factor in memory.
            b.append(local_b.t().to(options.dtype).clone(memory_format=torch.contiguous_format))
            scales.append(factors.scale)
        return LayerShard(
            A=torch.cat(a),
            B=tuple(b),
            a_ranks=tuple(map(len, a[1:])),
            b_ranks=tuple(map(len, b)),
            scales=tuple(scales),
        )

    def write(self, slot: int, first_row: int, shard: LayerShard, *, exchanged: bool) -> None:
        """Copy a shard into the pools and note that a slot holds it.

        Args:
            slot: The slot, which holds nothing; no batch in flight may use it. ``tables`` must be
                uploaded before one does.
            first_row: Where the adapter's rows begin in the pools of B.
            shard: What ``shard`` gave.
            exchanged: The shard is in the S-LoRA layout.

        Raises:
            ShapeError: There are no pools for the S-LoRA layout.
        """
        pools = self._exchanged if exchanged else self._own
        if pools is None:
            raise ShapeError("an S-LoRA shard in a layer without pools for that layout")
        pools.write(slot, first_row, shard)

    def clear(self, slot: int) -> None:
        """Note that a slot holds nothing.

        Args:
            slot: The slot; no batch in flight may use it. ``tables`` must be uploaded before one
                does.
        """
        self._own.clear(slot)
        if self._exchanged is not None:
            self._exchanged.clear(slot)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add what the step's adapters make of the input.

        Args:
            out: The base product ``[S, b, O_local]``, before the layer's own reduction.
            x: The layer's input as the base product reads it, ``[S, b, I_local]``.

        Returns:
            The sum; ``out`` itself, changed in place, where no gradient is recorded.
        """
        batch = self.step.batch
        assert batch is not None
        tokens, flat = x.flatten(0, -2), out.view(-1, out.shape[-1])
        how = self.step.implementation
        if self.step.own and self.cores is not None and self.step.cores is not None:
            z = shrink(tokens, self._own.factors, batch, implementation=how)
            z = self.cores.apply(z, self.step.cores, how)
            flat = expand(flat, z, self._own.factors, batch, implementation=how)
        elif self.step.own:
            flat = add_grouped(flat, tokens, self._own.factors, batch, implementation=how)
        if self.step.exchange and self._exchanged is not None:
            flat = self._add_exchanged(self._exchanged, flat, tokens, batch)
        return flat.view_as(out)

    def _add_exchanged(self, pools: Pools, out: Tensor, x: Tensor, batch: GroupedBatch) -> Tensor:
        group, how = self.tp_group, self.step.implementation
        z = shrink(x, pools.factors, batch, implementation=how)
        # In the model's own type on the wire, as a layer with one adapter sends it.
        if self._column:
            sent = z[..., : pools.part_rank].to(x.dtype).contiguous()
            gathered = gather_from_sequence_parallel_region(
                sent, tensor_parallel_output_grad=True, group=group
            )
            whole = gathered
            if group.size() > 1:
                whole = pools.in_order(gathered.chunk(group.size()), batch.token_slot)
        else:
            whole = reduce_from_tensor_model_parallel_region(z.to(x.dtype), group=group)
        return expand(out, whole.to(z.dtype), pools.factors, batch, implementation=how)
