"""Where a model's linear layers stand: decoder layers by number, as Hugging Face counts them.

A ``GPTModel`` layer holds attention and MLP. A ``HybridModel`` has a position for each, so its
positions are counted by occurrence (``decoder.hybrid_layers``), never by index. Both classes'
layers so have the same names here, such as ``decoder.layers.3.mlp.linear_fc1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from bdlora_megatron.convert.adapter.neutral import ModuleKey, ModuleName
from bdlora_megatron.decoder import PARTS, hybrid_layers
from bdlora_megatron.errors import TargetError

__all__ = [
    "attention_positions",
    "check_place",
    "decoder_keys",
    "decoder_layer",
    "hybrid_numbers",
    "model_class",
    "named_modules_global",
    "num_decoder_layers",
]

_DECODER_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.(\d+)\.(.+)")


def named_modules_global(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` with decoder layers numbered over the whole pipeline.

    Megatron-Core numbers ``decoder.layers`` from 0 on every stage; each layer knows its own place.
    The layers of a ``HybridModel`` are numbered as a ``GPTModel``'s; a position that has no number
    there is called ``position<index>``.
    """
    hybrid = _hybrid_names(model)
    names: dict[str, str] = {"": ""}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        number = getattr(module, "layer_number", None)
        if own.isdigit() and isinstance(number, int):
            own = hybrid.get(id(module), str(number - 1))
        names[name] = f"{names[parent]}.{own}" if names[parent] else own
        yield names[name], module


def _hybrid_names(model: nn.Module) -> dict[int, str]:
    """The numbers of a hybrid stack's layers, by the layers' ids."""
    names: dict[int, str] = {}
    for owner, pattern in _hybrid_owners(model):
        stack: Any = getattr(owner, "decoder", owner)
        numbers = hybrid_layers(pattern)
        for layer in stack.layers:
            position = int(layer.layer_number) - 1
            number = numbers[position] if position < len(numbers) else None
            names[id(layer)] = f"position{position}" if number is None else str(number)
    return names


def _hybrid_owners(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every ``HybridModel`` in a model with its pattern; lone hybrid stacks where none is there."""
    owners = [
        (module, pattern)
        for module in model.modules()
        if isinstance(pattern := getattr(module, "hybrid_layer_pattern", None), str)
        and hasattr(module, "decoder")
    ]
    return owners or [
        (module, _own_pattern(module))
        for module in model.modules()
        if hasattr(module, "layer_type_list")
    ]


def _own_pattern(stack: Any) -> str:
    """The pattern of a stack alone; a later pipeline stage does not know what stands before it."""
    first = stack.layers and stack.layers[0].layer_number == 1
    return "".join(stack.layer_type_list) if first else ""


def hybrid_numbers(model: nn.Module) -> dict[int, int]:
    """The decoder layer of each position of a ``HybridModel``; empty for a ``GPTModel``.

    Positions without a layer are left out.
    """
    return {
        position: number
        for _, pattern in _hybrid_owners(model)
        for position, number in enumerate(hybrid_layers(pattern))
        if number is not None
    }


def attention_positions(model: nn.Module) -> dict[int, int] | None:
    """The attention layer at each position of this stage that has one; None for a ``GPTModel``."""
    for owner, _ in _hybrid_owners(model):
        stack: Any = getattr(owner, "decoder", owner)
        found = [i for i, symbol in enumerate(stack.layer_type_list) if symbol == "*"]
        return {position: number for number, position in enumerate(found)}
    return None


def model_class(model: nn.Module) -> str:
    """The class of Megatron-Core's models that a model is or holds."""
    return "HybridModel" if _hybrid_owners(model) else "GPTModel"


def num_decoder_layers(model: nn.Module) -> int:
    """Decoder layers over the whole pipeline, as Hugging Face counts them.

    Raises:
        TargetError: The model has no configuration that tells.
    """
    for _, pattern in _hybrid_owners(model):
        numbers = [number for number in hybrid_layers(pattern) if number is not None]
        return max(numbers) + 1 if numbers else 0
    for module in model.modules():
        layers = getattr(getattr(module, "config", None), "num_layers", None)
        if isinstance(layers, int):
            return layers
    raise TargetError("the model has no TransformerConfig to tell its number of layers")


def decoder_layer(full_name: str) -> tuple[int, str] | None:
    """A linear layer's decoder layer, counted over the pipeline, and its place there.

    Args:
        full_name: Such as ``decoder.layers.3.mlp.linear_fc1``.

    Returns:
        Such as ``(3, "mlp.linear_fc1")``; None outside a decoder.
    """
    found = _DECODER_LAYER.fullmatch(full_name)
    return (int(found.group(1)), found.group(2)) if found else None


def decoder_keys(full_name: str, projection: str) -> list[ModuleKey]:
    """The modules that one pair of factors of a decoder layer updates.

    Args:
        full_name: The Megatron-Core layer's name, as ``named_modules_global`` gives it.
        projection: The pair's projection; empty for the only one, or for all of a fused layer.

    Returns:
        One module, or every one of a fused layer.

    Raises:
        TargetError: The layer is none of a decoder's four.
    """
    number, hf_names = check_place(full_name)
    names = [hf_names[projection]] if projection in hf_names else list(hf_names.values())
    return [ModuleKey(layer=number, name=name) for name in names]


def check_place(full_name: str) -> tuple[int, Mapping[str, ModuleName]]:
    """A linear layer's decoder layer and Hugging Face's names of its projections.

    Raises:
        TargetError: No adapter format has a name for the layer.
    """
    place = decoder_layer(full_name)
    hf_names = PARTS.get(place[1]) if place else None
    if place is None or hf_names is None:
        hint = (
            " (this hybrid_layer_pattern does not pair attention with an MLP, so its positions "
            "have no layer numbers in Hugging Face's sense)"
            if ".layers.position" in full_name
            else ""
        )
        raise TargetError(
            f"{full_name} is none of a decoder layer's {', '.join(PARTS)}{hint}; no adapter "
            "format has a name for an adapter there: leave it out with exclude_modules, or take "
            "it out with remove_lora"
        )
    return place[0], hf_names
