"""What a writer may be told, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bdlora_megatron.blocks import BlockFactors, all_finite, reshard
from bdlora_megatron.convert.adapter import Adapter, ModuleKey
from bdlora_megatron.convert.adapter.lazy import LazyModules, map_modules
from bdlora_megatron.convert.tensor_files import FLOATS
from bdlora_megatron.errors import AdapterFormatError, ConfigError

__all__ = ["WriteOptions", "prepare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteOptions:
    """How an adapter is written.

    Raises:
        ConfigError: A value is out of range.
    """

    tp: int = 1
    """Tensor-parallel ranks, for formats with a file per rank (`slora`)."""

    dtype: torch.dtype | None = None
    """The factors' type in the file; each factor's own when unset."""

    overwrite: bool = False
    """Replace the adapter that is at the path, with all else in its folder."""

    base_model: str | None = None
    """The base model's name or path, for formats that note it; the adapter's own when unset."""

    dense: bool = False
    """Write the same update as vanilla LoRA, with the zeros between the blocks."""

    fused: bool = False
    """One A for q, k, v and one for gate, up (`bridge`), as NeMo's LoRA trains it."""

    companions: Mapping[str, Path] = field(default_factory=dict)
    """Files to copy beside the adapter, such as its tokenizer, by their path in the folder."""

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise ConfigError(f"tp={self.tp}; wanted a number of tensor-parallel ranks, 1 or more")
        if self.dtype is not None and self.dtype not in FLOATS.values():
            raise ConfigError(f"dtype={self.dtype}; wanted one of {[*map(str, FLOATS.values())]}")


def prepare(adapter: Adapter, options: WriteOptions) -> Adapter:
    """The adapter as it is to be written: dense if asked for, in the type asked for.

    Returns:
        A lazy adapter, whose modules are checked for NaN and infinity when they are looked up.

    Raises:
        AdapterFormatError: If there is no module to write.
    """
    if not adapter.modules:
        raise AdapterFormatError(f"adapter {adapter.name!r} has no modules; there is nothing to do")

    if isinstance(adapter.modules, LazyModules) and not options.dense and options.dtype is None:
        return adapter

    def change(key: ModuleKey, factors: BlockFactors) -> BlockFactors:
        factors = reshard(factors, 1) if options.dense else factors
        return factors if options.dtype is None else _cast(factors, options.dtype)

    return map_modules(adapter, change, subject=f"cannot write adapter {adapter.name!r}")


def _cast(factors: BlockFactors, dtype: torch.dtype) -> BlockFactors:
    A, B = factors.A.to(dtype), factors.B.to(dtype)
    pairs = ((factors.A, A), (factors.B, B))
    if not A.is_meta and any(all_finite(old) and not all_finite(new) for old, new in pairs):
        raise AdapterFormatError(
            f"factors exceed {torch.finfo(dtype).max:.5g}, the largest number of {dtype}; write "
            "another type"
        )
    return replace(factors, A=A, B=B)
