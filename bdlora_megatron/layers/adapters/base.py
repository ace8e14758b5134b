"""What adapters on both sides share, and the checks on their plans."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from bdlora_megatron.errors import ConfigError, ShapeError
from bdlora_megatron.layers.adapters.products import Block, add_blocks
from bdlora_megatron.layers.factors import (
    Factor,
    FactorPair,
    FactorShape,
    dropped,
    kaiming_uniform,
    zeros,
)
from bdlora_megatron.layers.geometry import Projection

__all__ = [
    "Adapter",
    "AdapterOptions",
    "ProjectionPlan",
    "block_diagonal",
    "tied_replica",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionPlan:
    """The low-rank update of one projection.

    Attributes:
        projection: Where its rows stand.
        rank: Total rank R.
        num_blocks: Diagonal blocks N; 1 in the vanilla layouts.
        scale: s in ``s * B A``.
    """

    projection: Projection
    rank: int
    num_blocks: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOptions:
    """What is the same for every projection of a layer.

    Attributes:
        dropout: Probability of zeroing an input element on the adapter's path, in training.
        dtype: The factors' type.
        like: A tensor on the device the factors belong to.
        tp_group: The tensor-parallel group of the base layer.
    """

    dropout: float
    dtype: torch.dtype
    like: Tensor
    tp_group: Any


class Adapter(nn.Module):
    """What both sides share: factors by projection, the scale, dropout and checkpointing.

    It has no parameters until ``build`` makes them; before that it can say how factors are shared.

    Attributes:
        invocation_tokens: From which tokens on it acts (Activated LoRA); None for every token.
        acts: With them, on which tokens of the batch, ``[T]``; see ``layers.activation``.
    """

    plans: tuple[ProjectionPlan, ...]
    invocation_tokens: tuple[int, ...] | None = None
    acts: Tensor | None = None

    def __init__(self, plans: Sequence[ProjectionPlan], options: AdapterOptions) -> None:
        super().__init__()
        self.plans = tuple(plans)
        self.dropout = options.dropout
        self.tp_group = options.tp_group
        scales = {plan.scale for plan in self.plans}
        # One scale rides in the product's alpha; several are folded into the B factors.
        self.scale = scales.pop() if len(scales) == 1 else None

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks P."""
        size: int = self.tp_group.size()
        return size

    def build(self, options: AdapterOptions) -> None:
        """Make every projection's factors, under NeMo's names for canonical and fused LoRA.

        A is drawn as PEFT draws it, B is zero.
        """
        where = {"like": options.like, "dtype": options.dtype, "tp_group": options.tp_group}
        for plan in self.plans:
            A, B = self.factor_shapes(plan)
            linear_in, linear_out = Factor(A, kaiming_uniform, **where), Factor(B, zeros, **where)
            if plan.projection.name:
                pair = FactorPair(linear_in, linear_out)
                self.add_module(f"adapter_{plan.projection.name}", pair)
            else:
                self.add_module("linear_in", linear_in)
                self.add_module("linear_out", linear_out)

    def factor_shapes(self, plan: ProjectionPlan) -> tuple[FactorShape, FactorShape]:
        """The global shapes of A and B, and how ranks split them."""
        raise NotImplementedError

    def factors(self, plan: ProjectionPlan) -> tuple[Factor, Factor]:
        """The A and B factor of one projection."""
        name = plan.projection.name
        owner = self.get_submodule(f"adapter_{name}") if name else self
        linear_in, linear_out = owner.linear_in, owner.linear_out
        assert isinstance(linear_in, Factor)
        assert isinstance(linear_out, Factor)
        return linear_in, linear_out

    def plan(self, name: str) -> ProjectionPlan:
        """The plan of the projection called ``name``.

        Raises:
            KeyError: The layer has no adapter for that projection.
        """
        for plan in self.plans:
            if plan.projection.name == name:
                return plan
        raise KeyError(name)

    @torch.no_grad()
    def load(self, name: str, A: Tensor, B: Tensor) -> None:
        """Copy one rank's share of a projection's factors into the parameters.

        Args:
            name: The projection's name.
            A: Local A, in the shape of the table at the top of this module.
            B: Local B, likewise.

        Raises:
            ShapeError: A share does not have the parameter's shape.
        """
        for factor, share in zip(self.factors(self.plan(name)), (A, B), strict=True):
            if factor.weight.shape != share.shape:
                raise ShapeError(
                    f"factor of projection {name!r}: got a share {tuple(share.shape)}, wanted "
                    f"{tuple(factor.weight.shape)}; was it cut for another tensor-parallel size?"
                )
            factor.weight.copy_(share)

    def load_whole(self, name: str, A: Tensor, B: Tensor) -> None:
        """Copy this rank's share of whole factors into the parameters.

        Args:
            name: The projection's name.
            A: A over all ranks, packed where the layout blocks it.
            B: B over all ranks, likewise.
        """
        linear_in, linear_out = self.factors(self.plan(name))
        self.load(name, linear_in.cut(A), linear_out.cut(B))

    def shard(self, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of whole factors as plain matrices, without touching any parameter.

        Works on an adapter whose factors were never built.

        Args:
            name: The projection's name.
            A: A over all ranks, packed where the layout blocks it.
            B: B over all ranks, likewise.

        Returns:
            The matrices that map the local input to this rank's part of the projection's rank,
            ``[R_local, I_local]``, and that to the local output, ``[O_local, R_used]``.

        Raises:
            ShapeError: A factor does not have the shape that the plan says.
        """
        plan, local = self.plan(name), []
        where = {"tp_rank": self.tp_group.rank(), "tp_size": self.tp_size}
        for shape, whole in zip(self.factor_shapes(plan), (A, B), strict=True):
            if whole.shape != (shape.rows, shape.columns):
                raise ShapeError(
                    f"factor of projection {name!r}: got {list(whole.shape)}, wanted "
                    f"{[shape.rows, shape.columns]} over all ranks"
                )
            local.append(shape.cut(whole, **where))
        return self.lay_out_a(plan, local[0]), self.lay_out_b(plan, local[1])

    def lay_out_a(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """A local A with its blocks, if it has any, on the diagonal."""
        del plan
        return weight

    def lay_out_b(self, plan: ProjectionPlan, weight: Tensor) -> Tensor:
        """A local B with its blocks, if it has any, on the diagonal."""
        del plan
        return weight

    def shrink_weight(self) -> Tensor:
        """The local matrix that maps the input to the rank: ``[K_local, I_local]``."""
        raise NotImplementedError

    def expand_weight(self) -> Tensor:
        """The local matrix that maps the rank to the output: ``[O_local, K]``."""
        raise NotImplementedError

    def dropout_rng(self) -> AbstractContextManager[None]:
        """The random stream that dropout draws from."""
        return nullcontext()

    def dropout_mask(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Which elements of an input the adapter sees, or None for all of them."""
        if not (self.training and self.dropout):
            return None
        with self.dropout_rng():
            return torch.rand(shape, device=device) >= self.dropout

    def shrink(self, x: Tensor) -> Tensor:
        """Map the layer's input ``[S, b, I_local]`` to the rank ``[S, b, K_local]``."""
        A = self.shrink_weight()
        mask = self.dropout_mask(x.shape, x.device)
        return F.linear(dropped(x, mask, 1.0 - self.dropout).to(A.dtype), A)

    def exchange(self, z: Tensor) -> Tensor:
        """Communicate at the rank, where the layout needs it; ``[T, K_local]`` to ``[T, K]``."""
        return z

    def expand(self, z: Tensor, base: Tensor) -> Tensor:
        """Add the adapter's product to the base's.

        Args:
            z: What ``shrink`` gave, ``[S, b, K_local]``.
            base: The base product ``[S, b, O_local]``.

        Returns:
            ``base + s * z B^T``, in the type of ``base`` and, where autograd allows it, its memory.
        """
        z = z.flatten(0, -2)
        if self.invocation_tokens:
            z = z.masked_fill(~self._acting(len(z))[:, None], 0.0)
        return self.add_product(base, self.exchange(z))

    def _acting(self, count: int) -> Tensor:
        """The tokens of this call on which the adapter acts.

        Raises:
            ConfigError: Nobody has said which.
        """
        told = None if self.acts is None else len(self.acts)
        if self.acts is None or told != count:
            raise ConfigError(
                f"the adapter acts from its invocation tokens {list(self.invocation_tokens or ())} "
                f"on, and the batch has {count} tokens, of which it was told "
                f"{'nothing' if told is None else told}; call act_on(model, active_tokens("
                "input_ids, invocation_tokens)) before each forward pass"
            )
        return self.acts

    def add_product(self, base: Tensor, z: Tensor) -> Tensor:
        """``base + s * z B^T`` on ``[S, b, O_local]`` and ``[T, K]``."""
        block = Block(self.first_row(), 0, self.outer_scale, self.expand_weight())
        return add_blocks(base, z, [block])

    def first_row(self) -> int:
        """Where the rows of ``expand_weight`` stand in the base product."""
        return 0

    @property
    def outer_scale(self) -> float:
        """The scale that is not folded into the B factors."""
        return 1.0 if self.scale is None else self.scale

    def whole_weights(self) -> tuple[Tensor, Tensor]:
        """The A and B whose product is the update of the local base weight."""
        return self.shrink_weight(), self.expand_weight()

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype) -> Tensor:
        """The update of the local base weight, ``s * B A``, ``[O_local, I_local]``.

        Returns:
            The dense update, in ``dtype``.

        Collectives: none in ``bdlora`` and ``half_sharded``; one all-gather of a factor in
        ``slora``.
        """
        A, B = self.whole_weights()
        return torch.mm(B.to(dtype), A.to(dtype)) * self.outer_scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe every local factor to ``megatron.core.dist_checkpointing``."""
        sharded: dict[str, Any] = {}
        for name, module in self.named_modules():
            if isinstance(module, Factor):
                key = f"{prefix}{name}."
                sharded.update(module.sharded_state_dict(key, sharded_offsets, metadata))
        return sharded


def block_diagonal(packed: Tensor, blocks: int) -> Tensor:
    """Lay ``blocks`` row groups of a packed factor on a diagonal."""
    return packed if blocks == 1 else torch.block_diag(*packed.chunk(blocks))


def tied_replica(weight: Tensor, tp_group: Any) -> Tensor:
    """A replica whose gradient is summed over ranks, so that the replicas stay equal."""
    tied: Tensor = copy_to_tensor_model_parallel_region(weight, group=tp_group)
    return tied
