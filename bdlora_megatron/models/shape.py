"""The sizes of a dense decoder: one record for base models, checks and the cost model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from bdlora_megatron.decoder import DEFAULT_TARGETS, LINEARS, heads_fit
from bdlora_megatron.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from bdlora_megatron.blocks import ModuleShape

__all__ = ["Linear", "ModelShape"]

ShapeT = TypeVar("ShapeT", bound="ModelShape")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One tensor-parallel layer with the projections that Megatron-Core fuses into it.

    Attributes:
        name: Megatron-Core's name.
        in_features: Input size over all ranks.
        out_features: Output size of each projection over all ranks.
        blocked: Which factor of a BD-LoRA is block-diagonal: ``"B"`` beside a column-parallel
            layer, ``"A"`` beside a row-parallel one.
        replicas: How often each projection's heads are counted in ``out_features``; see
            ``ModelShape.kv_head_replicas``.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    blocked: Literal["A", "B"]
    replicas: tuple[int, ...] = ()

    def local_sizes(self, tp: int) -> tuple[int, int]:
        """One rank's input size, and its output size over all projections.

        Args:
            tp: Tensor-parallel ranks.

        Returns:
            Both; the ranks split the one that is not whole on each of them.
        """
        column = self.blocked == "B"
        outputs = sum(self.out_features)
        return self.in_features // (1 if column else tp), outputs // (tp if column else 1)

    def module_shapes(self) -> list[ModuleShape]:
        """Its projections one by one."""
        # Late: the algebra imports torch, and a model's sizes are read where there is none.
        from bdlora_megatron.blocks import ModuleShape

        return [
            ModuleShape(in_features=self.in_features, out_features=out, blocked=self.blocked)
            for out in self.out_features
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A dense, gated, grouped-query decoder.

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        ffn_size: Width inside the gated MLP.
        num_heads: Query heads.
        num_kv_heads: Key-value heads, replicas among them; divides ``num_heads``.
        head_dim: Width of a head; not always ``hidden_size / num_heads``.
        vocab_size: Rows of the embedding as stored, without padding.
        tied: The output layer uses the embedding's weight.
        kv_head_replicas: How many ranks hold each of the model's own key-value heads, where they
            are fewer than the ranks: then ``num_kv_heads`` is the number of ranks. Else 1.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    kv_head_replicas: int = 1

    def for_serving(self: ShapeT, tp: int) -> ShapeT:
        """The model as ``tp`` ranks serve it: each holds whole key-value heads.

        Where there are fewer of them than ranks, each head is repeated on the ranks that hold the
        query heads which read it.

        Args:
            tp: Tensor-parallel ranks.

        Returns:
            The same model; with one key-value head for each rank if it has fewer.

        Raises:
            ConfigError: Its layers do not divide; with the sizes that would do.
        """
        if tp < 1 or not self._fits(tp, replicated=True):
            raise ConfigError(self._refusal(tp, replicated=True))
        if self.num_kv_heads >= tp:
            return self
        replicas = tp // self.num_kv_heads
        return replace(self, num_kv_heads=tp, kv_head_replicas=replicas * self.kv_head_replicas)

    @property
    def own_kv_heads(self) -> int:
        """Key-value heads without replicas."""
        return self.num_kv_heads // self.kv_head_replicas

    def linears(self, targets: Sequence[str] = DEFAULT_TARGETS) -> tuple[Linear, ...]:
        """The tensor-parallel layers of one decoder layer, in order.

        Args:
            targets: Leave out what is not named here.
        """
        sizes = {
            "hidden_size": self.hidden_size,
            "ffn_size": self.ffn_size,
            "q_size": self.num_heads * self.head_dim,
            "kv_size": self.num_kv_heads * self.head_dim,
        }
        return tuple(
            Linear(
                name=linear.name,
                in_features=sizes[linear.in_size],
                out_features=tuple(sizes[part.out_size] for part in linear.projections),
                blocked=linear.blocked,
                replicas=tuple(
                    self.kv_head_replicas if part.out_size == "kv_size" else 1
                    for part in linear.projections
                ),
            )
            for linear in LINEARS
            if linear.name in targets
        )

    def module_shapes(self, targets: Sequence[str] = DEFAULT_TARGETS) -> list[ModuleShape]:
        """The projections of these layers, for ``matching_rank``."""
        return [shape for linear in self.linears(targets) for shape in linear.module_shapes()]

    def num_parameters(self) -> int:
        """Weights of all layers, embedding and output; norms and biases are left out."""
        per_layer = sum(linear.in_features * sum(linear.out_features) for linear in self.linears())
        tables = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * per_layer + tables

    def check_tp(self, tp: int) -> None:
        """Refuse a tensor-parallel size that the layers do not divide by.

        Args:
            tp: Tensor-parallel ranks.

        Raises:
            ConfigError: With the sizes that would do.
        """
        if tp < 1 or not self._fits(tp, replicated=False):
            raise ConfigError(self._refusal(tp, replicated=False))

    def _fits(self, tp: int, *, replicated: bool) -> bool:
        whole = replicated or self.num_kv_heads % tp == 0
        return whole and heads_fit(tp, self.num_heads, self.num_kv_heads) and not self.ffn_size % tp

    def _refusal(self, tp: int, *, replicated: bool) -> str:
        sizes = range(1, self.num_heads + 1)
        fit = [str(size) for size in sizes if self._fits(size, replicated=replicated)]
        more = ""
        if tp >= 1 and self._fits(tp, replicated=True):
            more = (
                f"; tp={tp} is for serving alone, which repeats key-value heads on several ranks: "
                "nothing sums the copies' gradients"
            )
        return (
            f"tp={tp} does not divide {self.num_heads} heads, {self.num_kv_heads} key-value "
            f"heads and an MLP of {self.ffn_size}; use one of {', '.join(fit)}{more}"
        )

    def check_stages(self, stages: int) -> None:
        """Refuse a pipeline-parallel size that the layers do not divide by.

        Args:
            stages: Pipeline stages.

        Raises:
            ShapeError: With the sizes that would do.
        """
        if self.num_layers % stages:
            fit = [size for size in range(1, self.num_layers + 1) if self.num_layers % size == 0]
            raise ShapeError(
                f"num_hidden_layers={self.num_layers} cannot be divided over {stages} pipeline "
                f"stages; use one of {fit}"
            )
