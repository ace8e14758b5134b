"""Models and adapters of other formats, read and written."""

from bdlora_megatron.convert.adapter import Adapter, BaseShape, ModuleKey
from bdlora_megatron.convert.hf_base import HFConfig, load_hf_model, read_hf_config
from bdlora_megatron.convert.peft_reader import read_peft

__all__ = [
    "Adapter",
    "BaseShape",
    "HFConfig",
    "ModuleKey",
    "load_hf_model",
    "read_hf_config",
    "read_peft",
]
