"""One tensor-parallel rank's share of Llama-3.1-8B's layers at eight ranks."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.ops import Columns

__all__ = ["LAYERS", "Layer"]


@dataclass(frozen=True)
class Layer:
    """One rank's share of a layer."""

    name: str
    in_features: int
    columns: tuple[Columns, ...]

    @property
    def out_features(self) -> int:
        """Output columns."""
        return max(part.end for part in self.columns)


#: One key-value head and four query heads of 128 on each rank.
LAYERS = (
    Layer(
        "qkv",
        4096,
        (Columns(width=512), Columns(width=128, offset=512), Columns(width=128, offset=640)),
    ),
    Layer("proj", 512, (Columns(width=4096),)),
    Layer("gate, up", 4096, (Columns(width=1792), Columns(width=1792, offset=1792))),
    Layer("down", 1792, (Columns(width=4096),)),
)
