"""One adapter factor as a module: its weight, its place among ranks, its checkpoint shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor, nn

from bdlora_megatron.layers.geometry import Stretch
from bdlora_megatron.runtime.versions.layers import sharded_by_stretch, sharded_for_checkpoint

__all__ = ["Factor", "FactorPair", "FactorShape", "dropped", "kaiming_uniform", "zeros"]

Init = Callable[[Tensor], object]


def kaiming_uniform(weight: Tensor) -> None:
    """Fill a full factor as PEFT fills A: uniform, bounded by ``1 / sqrt(columns)``."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def zeros(weight: Tensor) -> None:
    """Fill a full factor with zeros, so that a fresh adapter changes nothing."""
    nn.init.zeros_(weight)


def dropped(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Apply a dropout mask to a factor's input, if there is one, and rescale what is left."""
    return x if mask is None else x * mask * (1.0 / keep)


@dataclass(frozen=True, kw_only=True, slots=True)
class FactorShape:
    """A factor over all ranks and how one rank's share is cut out of it.

    Attributes:
        rows: Rows over all ranks.
        columns: Columns over all ranks.
        shard_dim: The dimension that is split evenly over ranks; None for a replica on each.
        parts: Stretches of the rows that are each split by themselves (see ``Projection.parts``);
            empty where they are one.
    """

    rows: int
    columns: int
    shard_dim: int | None
    parts: tuple[Stretch, ...] = ()

    def stretches(self, rows: Tensor, *, share: int = 1) -> tuple[Tensor, ...]:
        """The stretches of a factor's rows, of the whole or of one of ``share`` equal shares."""
        sizes = [part.size // share for part in self.parts] or [len(rows)]
        stretches: tuple[Tensor, ...] = rows.split(sizes)
        return stretches

    def cut(self, full: Tensor, *, tp_rank: int, tp_size: int) -> Tensor:
        """Cut one rank's share out of a whole factor.

        Args:
            full: ``[rows, columns]``.
            tp_rank: Which rank.
            tp_size: Tensor-parallel ranks P.

        Returns:
            The share; ``full`` itself where every rank holds all of it.
        """
        dim = self.shard_dim
        if dim is None or tp_size == 1:
            return full
        pieces = [part.chunk(tp_size, dim=dim)[tp_rank] for part in self.stretches(full)]
        return torch.cat(pieces, dim=dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """Put a whole factor together from every rank's share; the inverse of ``cut``."""
        if self.shard_dim is None:
            return shares[0]
        cut = [self.stretches(share, share=len(shares)) for share in shares]
        pieces = [piece for stretch in zip(*cut, strict=True) for piece in stretch]
        return torch.cat(pieces, dim=self.shard_dim)


class Factor(nn.Module):
    """A factor's local weight.

    Shapes: global ``[rows, columns]``; local: ``shard_dim`` divided by the tensor-parallel size.

    Collectives: one broadcast at construction where the factor is a replica; none afterwards.
    """

    weight: nn.Parameter

    def __init__(
        self, shape: FactorShape, init: Init, *, like: Tensor, dtype: torch.dtype, tp_group: Any
    ) -> None:
        super().__init__()
        self.shape = shape
        self.tp_group = tp_group
        # The whole factor is drawn on each rank and cut, so that a model starts from the same
        # adapter at any tensor-parallel size (given equal CPU seeds, as Megatron sets them).
        full = torch.empty(shape.rows, shape.columns, dtype=torch.float32, device="cpu")
        init(full)
        local = self.cut(full).to(device=like.device, dtype=dtype).contiguous()
        self.weight = nn.Parameter(local)
        if shape.shard_dim is None and tp_group.size() > 1:
            source = torch.distributed.get_global_rank(tp_group, 0)
            torch.distributed.broadcast(self.weight.data, source, group=tp_group)
        set_tensor_model_parallel_attributes(
            self.weight,
            is_parallel=shape.shard_dim is not None,
            dim=-1 if shape.shard_dim is None else shape.shard_dim,
            stride=max(1, len(shape.parts)),
        )
        # Megatron's DDP reduces gradients of parameters with this mark over data-parallel ranks.
        self.weight.allreduce = True  # type: ignore[attr-defined]

    def forward(self) -> Tensor:
        """The local weight; layers get it by this call, whatever it is used for.

        What gathers parameters only when they are needed (Megatron's ``overlap_param_gather``)
        waits in the module's forward hooks; a layer that read ``weight`` would compute with the
        shares that the ranks had before.
        """
        return self.weight

    def cut(self, full: Tensor) -> Tensor:
        """Cut this rank's share out of a whole factor ``[rows, columns]``."""
        group = self.tp_group
        return self.shape.cut(full, tp_rank=group.rank(), tp_size=group.size())

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the local shard to ``megatron.core.dist_checkpointing``."""
        axis = {} if self.shape.shard_dim is None else {"weight": self.shape.shard_dim}
        sharded = sharded_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axis,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        key, parts = f"{prefix}weight", self.shape.parts
        if [part.name for part in parts] == ["gate", "up"]:
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        elif parts:
            size = self.tp_group.size()
            local = {part.name: part.size // size for part in parts}
            sharded[key] = sharded_by_stretch(sharded[key], local)
        return sharded

    def extra_repr(self) -> str:
        """Show the local shape and what is split."""
        return f"{tuple(self.weight.shape)}, shard_dim={self.shape.shard_dim}"


class FactorPair(nn.Module):
    """The factors of one projection, under NeMo's names: ``linear_in`` is A, ``linear_out`` B."""

    def __init__(self, linear_in: Factor, linear_out: Factor) -> None:
        super().__init__()
        self.linear_in = linear_in
        self.linear_out = linear_out
