"""Block-diagonal LoRA for Megatron-Core: tensor-parallel adapters that add no communication.

The names below are the package's public face. Each is imported on first use, so that
``import bdlora_megatron`` needs neither torch nor Megatron-Core. Subpackages hold the rest.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdlora_megatron.blocks import matching_rank
    from bdlora_megatron.config import Layout, LoRAConfig
    from bdlora_megatron.convert import read_adapter, write_adapter
    from bdlora_megatron.export import save_adapter
    from bdlora_megatron.layers import (
        adapters_disabled,
        apply_lora,
        collect_adapter,
        load_adapter,
        lora_spec,
        merge_adapters,
        remove_lora,
    )
    from bdlora_megatron.models import load_hf_model

__all__ = [
    "Layout",
    "LoRAConfig",
    "__version__",
    "adapters_disabled",
    "apply_lora",
    "collect_adapter",
    "load_adapter",
    "load_hf_model",
    "lora_spec",
    "matching_rank",
    "merge_adapters",
    "read_adapter",
    "remove_lora",
    "save_adapter",
    "write_adapter",
]

_HOMES = {
    "blocks": ("matching_rank",),
    "config": ("Layout", "LoRAConfig"),
    "convert": ("read_adapter", "write_adapter"),
    "export": ("save_adapter",),
    "layers": (
        "adapters_disabled",
        "apply_lora",
        "collect_adapter",
        "load_adapter",
        "lora_spec",
        "merge_adapters",
        "remove_lora",
    ),
    "models": ("load_hf_model",),
}

try:
    __version__ = version("bdlora-megatron")
except PackageNotFoundError:
    # A source tree that was never installed.
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
