"""A Hugging Face Llama-family checkpoint as a Megatron-Core ``GPTModel``."""

from bdlora_megatron.convert.hf_base.build import (
    build_gpt_model,
    default_layer_spec,
    padded_vocab_size,
    transformer_config,
    without_padding,
)
from bdlora_megatron.convert.hf_base.config import HFConfig, parse_hf_config, read_hf_config
from bdlora_megatron.convert.hf_base.files import TensorFiles
from bdlora_megatron.convert.hf_base.load import load_hf_model, load_hf_weights
from bdlora_megatron.convert.hf_base.rope import RopeSettings

__all__ = [
    "HFConfig",
    "RopeSettings",
    "TensorFiles",
    "build_gpt_model",
    "default_layer_spec",
    "load_hf_model",
    "load_hf_weights",
    "padded_vocab_size",
    "parse_hf_config",
    "read_hf_config",
    "transformer_config",
    "without_padding",
]
