"""Models and adapters of other formats, read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.base_check import check_base
from bdlora_megatron.convert.formats import (
    FormatName,
    detect_format,
    open_adapter,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.convert.lazy import LazyModules, in_memory, map_modules, module_facts
from bdlora_megatron.convert.peft_reader import read_peft
from bdlora_megatron.convert.write_options import WriteOptions

if TYPE_CHECKING:
    from bdlora_megatron.convert.hf_base import HFConfig, load_hf_model, read_hf_config

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
    # Base models need Megatron-Core, whose import takes seconds; adapters do not.
    if name in ("HFConfig", "load_hf_model", "read_hf_config"):
        from bdlora_megatron.convert import hf_base

        return getattr(hf_base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
