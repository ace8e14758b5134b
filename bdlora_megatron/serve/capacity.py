"""How much room a model makes for adapters, and one rank's shard of an adapter on the host."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bdlora_megatron.config import DEFAULT_TARGETS, Layout
from bdlora_megatron.decoder import ALL_LINEARS
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers.pools import LayerShard
from bdlora_megatron.ops.grouped import Implementation

__all__ = ["AdapterShard", "SlotCapacity"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotCapacity:
    """How many adapters a model holds on its device, and of what size."""

    max_loras: int = 32
    """Adapters at once, at most."""

    max_lora_rank: int = 64
    """The most rank rows that one rank holds of an adapter's module: R / P of a BD-LoRA whose
    blocks divide over the P ranks, R of a vanilla one or in the S-LoRA layout."""

    lora_memory_bytes: int | None = None
    """Memory of all pools on one rank. Adapters then share the rows, and one of few ranks takes
    few. Unset, there is room for ``max_loras`` adapters of ``max_lora_rank``."""

    layouts: tuple[Layout, ...] = (Layout.BDLORA, Layout.HALF_SHARDED)
    """Which layouts adapters may be held in. ``slora`` has pools of its own beside those that
    serve the other two."""

    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    """The layers that get slots, by their names in Megatron-Core."""

    dtype: torch.dtype | None = None
    """The factors' type; the base weights' when unset."""

    implementation: Implementation | None = None
    """Of the grouped product, instead of the device's own."""

    def __post_init__(self) -> None:
        if min(self.max_loras, self.max_lora_rank) < 1:
            raise ConfigError(
                f"max_loras={self.max_loras}, max_lora_rank={self.max_lora_rank}; both are at "
                "least 1"
            )
        object.__setattr__(self, "layouts", tuple(map(Layout, self.layouts)))
        if not self.layouts:
            raise ConfigError("layouts=(); wanted one at least, 'bdlora' for most uses")
        known = tuple(dict.fromkeys(linear.name for linear in ALL_LINEARS))
        if set(self.target_modules) - set(known) or not self.target_modules:
            raise ConfigError(f"target_modules={self.target_modules}; wanted some of {known}")

    @property
    def own(self) -> bool:
        """There are pools for adapters that each rank multiplies alone."""
        return any(layout is not Layout.SLORA for layout in self.layouts)

    @property
    def exchanged(self) -> bool:
        """There are pools for adapters in the S-LoRA layout."""
        return Layout.SLORA in self.layouts


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterShard:
    """One rank's shard of an adapter, on the host.

    Attributes:
        layers: Shard of each layer that the adapter changes, by the layer's full name.
        rows: Pool rows that it takes.
        num_bytes: Bytes of the factors.
        exchanged: It is in the S-LoRA layout.
        digest: A number that tells whether other ranks read an adapter of the same modules, ranks,
            scales and invocation tokens.
        invocation_tokens: As of ``Adapter``.
    """

    layers: Mapping[str, LayerShard]
    rows: int
    num_bytes: int
    exchanged: bool
    digest: int
    invocation_tokens: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LayerShard],
        *,
        exchanged: bool,
        invocation_tokens: tuple[int, ...] | None = None,
    ) -> AdapterShard:
        """Sum up the shards of an adapter's layers.

        Args:
            layers: Shard of each layer, by full name; at least one.
            exchanged: They are in the S-LoRA layout.
            invocation_tokens: As of ``Adapter``.

        Returns:
            The shard of the whole adapter.
        """
        facts = [(n, s.a_ranks, s.b_ranks, s.scales, s.A.shape[1]) for n, s in layers.items()]
        return cls(
            layers=layers,
            rows=max(shard.rows for shard in layers.values()),
            num_bytes=sum(shard.num_bytes for shard in layers.values()),
            exchanged=exchanged,
            digest=zlib.crc32(repr((exchanged, facts, invocation_tokens)).encode()),
            invocation_tokens=invocation_tokens,
        )
