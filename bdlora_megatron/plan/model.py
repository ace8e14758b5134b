"""The sizes of a Llama-family model that decide what a step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdlora_megatron.blocks import Blocked, ModuleShape
from bdlora_megatron.config import DEFAULT_TARGETS
from bdlora_megatron.decoder import LINEARS, MODULE_NAMES, facts_of
from bdlora_megatron.errors import ConfigError

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["PRESETS", "Linear", "ModelShape", "check_targets"]


def check_targets(names: Sequence[str]) -> None:
    """Refuse layers that the cost model does not know.

    Args:
        names: Of the layers that an adapter changes.

    Raises:
        ConfigError: There are none, or one of them is not in ``DEFAULT_TARGETS`` or comes twice.
    """
    unknown = [name for name in names if name not in DEFAULT_TARGETS]
    parts = [f"{name} is in {facts_of(name)[0].name}" for name in MODULE_NAMES if name in unknown]
    if unknown or not names or len(set(names)) < len(names):
        hint = f" ({', '.join(parts)})" if parts else ""
        raise ConfigError(
            f"target_modules={','.join(names)}{hint}; wanted one or more of "
            f"{', '.join(DEFAULT_TARGETS)}, each once"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One tensor-parallel layer with the projections that Megatron-Core fuses into it.

    Attributes:
        name: Megatron-Core's name.
        in_features: Input size over all ranks.
        out_features: Output size of each projection over all ranks.
        blocked: Which factor of a BD-LoRA is block-diagonal: ``"B"`` beside a column-parallel
            layer, ``"A"`` beside a row-parallel one.
    """

    name: str
    in_features: int
    out_features: tuple[int, ...]
    blocked: Blocked

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
        num_kv_heads: Key-value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        tied: The output layer uses the embedding's weight.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> ModelShape:
        """Take the sizes from a model's ``config.json``, as ``read_hf_config`` returns it."""
        return cls(
            num_layers=hf.num_layers,
            hidden_size=hf.hidden_size,
            ffn_size=hf.ffn_size,
            num_heads=hf.num_heads,
            num_kv_heads=hf.num_kv_heads,
            head_dim=hf.head_dim,
            vocab_size=hf.vocab_size,
            tied=hf.tied,
        )

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
        if tp < 1 or self.num_kv_heads % tp or self.num_heads % tp or self.ffn_size % tp:
            fit = [
                size
                for size in range(1, self.num_kv_heads + 1)
                if not (self.num_kv_heads % size or self.num_heads % size or self.ffn_size % size)
            ]
            raise ConfigError(
                f"tp={tp} does not divide {self.num_heads} heads, {self.num_kv_heads} key-value "
                f"heads and an MLP of {self.ffn_size}; use one of {', '.join(map(str, fit))}"
            )


#: Sizes from the models' own config.json.
PRESETS = {
    "llama-3.1-8b": ModelShape(
        num_layers=32,
        hidden_size=4096,
        ffn_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
    "llama-3.1-70b": ModelShape(
        num_layers=80,
        hidden_size=8192,
        ffn_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    ),
}
