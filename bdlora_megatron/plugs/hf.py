"""PEFT's ``adapter_config.json`` for an adapter that a host trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert.adapter import blocked_factor
from bdlora_megatron.layers.load import HF_NAMES, decoder_layer

__all__ = ["hf_adapter_config"]


def hf_adapter_config(
    lora: LoRAConfig, adapted: Sequence[str], *, num_layers: int, base: str | None = None
) -> dict[str, Any]:
    """What PEFT needs to know of an adapter, ready for ``json.dump``.

    Args:
        lora: What was put into the model.
        adapted: Full names of the layers that carry an adapter, as ``apply_lora`` returns them.
        num_layers: Decoder layers of the model.
        base: Name or path of the base model, where it is known.

    Returns:
        The fields of PEFT's ``LoraConfig`` that are not its defaults. Layers outside a decoder, and
        those that Hugging Face's Llama family does not have, are left out.
    """
    found = [place for place in map(decoder_layer, adapted) if place is not None]
    names = {name for _, own in found for name in HF_NAMES.get(own, {}).values()}
    layers = sorted({number for number, _ in found})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted(names),
        "layers_to_transform": None if layers == list(range(num_layers)) else layers,
        "use_bdlora": {
            "target_modules_bd_a": sorted(n for n in names if blocked_factor(n) == "A"),
            "target_modules_bd_b": sorted(n for n in names if blocked_factor(n) == "B"),
            "nblocks": lora.blocks,
            "match_strict": True,
        },
    }
