"""Models and adapters of other formats, read and written."""

from bdlora_megatron.convert.hf_base import HFConfig, load_hf_model, read_hf_config

__all__ = ["HFConfig", "load_hf_model", "read_hf_config"]
