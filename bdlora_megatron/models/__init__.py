"""Base models: a Hugging Face Llama-family checkpoint as a Megatron-Core model.

``config``, ``rope`` and ``files`` read what is stored, ``check`` holds adapters to a base's shapes,
both without Megatron-Core. ``build``, ``layout`` and ``load`` make the model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bdlora_megatron.models.config import HFConfig, parse_hf_config, read_hf_config
from bdlora_megatron.models.rope import RopeSettings

if TYPE_CHECKING:
    from bdlora_megatron.models.build import (
        build_model,
        default_layer_spec,
        padded_vocab_size,
        transformer_config,
        without_padding,
    )
    from bdlora_megatron.models.files import TensorFiles
    from bdlora_megatron.models.load import load_hf_model, load_hf_weights

__all__ = [
    "HFConfig",
    "RopeSettings",
    "TensorFiles",
    "build_model",
    "default_layer_spec",
    "load_hf_model",
    "load_hf_weights",
    "padded_vocab_size",
    "parse_hf_config",
    "read_hf_config",
    "transformer_config",
    "without_padding",
]


def __getattr__(name: str) -> Any:
    # They need torch or Megatron-Core, whose import takes seconds; a configuration needs neither.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "load" if name.startswith("load_") else "build"
    home = "files" if name == "TensorFiles" else home
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
