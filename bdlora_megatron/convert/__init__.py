"""Models and adapters of other formats, read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.adapter.lazy import LazyModules, in_memory, map_modules, module_facts
from bdlora_megatron.convert.peft.reader import read_peft
from bdlora_megatron.convert.registry import (
    FormatName,
    detect_format,
    open_adapter,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.convert.write_options import WriteOptions
from bdlora_megatron.models import HFConfig, read_hf_config
from bdlora_megatron.models.check import check_base

if TYPE_CHECKING:
    from bdlora_megatron.models import load_hf_model

__all__ = [
    "Adapter",
    "BaseShape",
    "FormatName",
    "HFConfig",
    "LazyModules",
    "ModuleKey",
    "WriteOptions",
    "check_base",
    "detect_format",
    "in_memory",
    "load_hf_model",
    "map_modules",
    "module_facts",
    "open_adapter",
    "read_adapter",
    "read_hf_config",
    "read_peft",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    # Needs Megatron-Core, whose import takes seconds; adapters do not.
    if name == "load_hf_model":
        from bdlora_megatron.models import load_hf_model

        return load_hf_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
