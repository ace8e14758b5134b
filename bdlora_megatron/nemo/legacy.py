"""``model.peft.peft_scheme: bdlora`` for NeMo 1.x's ``PEFT_CONFIG_MAP``.

NeMo 1.x makes a config object from the model's YAML, and changes the class of modules in each
decoder layer to one that knows the adapter. Here that is the decoder layer's own class with one
step more: its linear layers are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from nemo.collections.nlp.modules.common.megatron.adapters.mcore_mixins import (
    MCoreAdapterModuleMixin,
)
from nemo.collections.nlp.parts.peft_config import (
    LORA_CONFIG_TO_MCORE_MAP,
    PEFTConfig,
    get_target_modules,
)

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers import apply_lora, lora_layers
from bdlora_megatron.plugs import BlockDiagonalSettings, read_scheme

__all__ = ["BDLoRAPEFTConfig"]

_NAME = "bdlora"


@dataclass
class _AdapterConfig:
    """NeMo wants to know an adapter module's class; ours are made by the exchanged layers."""

    _target_: str = "bdlora_megatron.layers.LoRALinear"


class BDLoRAPEFTConfig(PEFTConfig):
    """What NeMo 1.x's ``model.add_adapter`` takes.

    Reads ``model.peft.bdlora``, with the keys of ``BlockDiagonalSettings``; ``target_modules`` may
    also hold NeMo 1.x's names, such as ``attention_qkv`` or ``all``.
    """

    def __init__(self, cfg: Any) -> None:
        """Read the model's configuration.

        Args:
            cfg: The model's, with a ``peft`` section.

        Raises:
            ConfigError: A key or a value is wrong.
        """
        section = cfg.peft.get("bdlora") or {}
        settings = dict(read_scheme({"scheme": "bdlora", "bdlora": section}).arguments)
        if "target_modules" in settings:
            old_names = get_target_modules(settings)
            settings["target_modules"] = [LORA_CONFIG_TO_MCORE_MAP.get(n, n) for n in old_names]
        if any("*" in name for name in settings.get("target_modules", ())):
            raise ConfigError(
                "peft.bdlora.target_modules has wildcards; NeMo 1.x adapts layer by layer: name "
                "linear layers, and choose decoder layers with layer_selection"
            )
        if settings.get("match_params_of_lora_rank") is not None:
            raise ConfigError("match_params_of_lora_rank needs the whole model; set rank instead")
        lora = BlockDiagonalSettings(**settings).lora_config([])
        self.name_key_to_mcore_mixins = {_NAME: [("", _layer_class(lora))]}
        super().__init__(cfg.peft, {_NAME: _AdapterConfig()})


def _layer_class(lora: LoRAConfig) -> type:
    class BDLoRATransformerLayer(TransformerLayer, MCoreAdapterModuleMixin):
        """A decoder layer that carries adapters; NeMo's calls on it, by NeMo's names."""

        def mcore_register_adapters(self) -> None:
            """Exchange the layer's linear layers."""
            apply_lora(self, lora)

        def get_accepted_adapter_types(self) -> set[type]:
            """None that NeMo would have to add itself."""
            return set()

        def is_adapter_available(self) -> bool:
            """Whether there is something to train."""
            return any(layer.adapter is not None for _, layer in lora_layers(self))

        def set_enabled_adapters(self, name: str | None = None, enabled: bool = True) -> None:
            """Switch all adapters on or off."""
            del name
            for _, layer in lora_layers(self):
                layer.adapter_enabled = enabled

        def unfreeze_enabled_adapters(self, freeze_batchnorm: bool = True) -> None:
            """Leave the adapters trainable."""
            del freeze_batchnorm
            for _, layer in lora_layers(self):
                if layer.adapter is not None:
                    layer.adapter.requires_grad_(True)

    return BDLoRATransformerLayer
