"""Where a model's linear layers stand: decoder layers by number, as Hugging Face counts them.

A ``GPTModel`` layer holds attention and MLP. A ``HybridModel`` has a position for each, so its
positions are counted by occurrence (``decoder.hybrid_layers``), never by index. Both classes'
layers so have the same names here, such as ``decoder.layers.3.mlp.linear_fc1``. In families such as
Nemotron-H each position is a layer in Hugging Face's sense too: the pattern tells, or
``number_layers`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from torch import nn

from bdlora_megatron.convert.adapter.neutral import ModuleKey, ModuleName
from bdlora_megatron.decoder import (
    ALL_LINEARS,
    NUMBERINGS,
    Numbering,
    hybrid_layers,
    hybrid_numbering,
    parts_of,
)
from bdlora_megatron.errors import TargetError

__all__ = [
    "attention_positions",
    "check_place",
    "check_split",
    "decoder_keys",
    "decoder_layer",
    "from_all_stages",
    "hybrid_numbers",
    "is_whole",
    "known_numbering",
    "layer_numbering",
    "model_class",
    "named_modules_global",
    "num_decoder_layers",
    "number_layers",
]

T = TypeVar("T")
#: Of MLA: every rank holds them whole, or gathers their output.
_DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj", "linear_qkv_down_proj")
_NUMBERING = "bdlora_numbering"
_UNNUMBERED = (
    " (this hybrid_layer_pattern does not say whether Hugging Face's model numbers each position "
    'or each pair of attention and MLP; say so with number_layers(model, "positions"), as in '
    'Nemotron-H, or "pairs")'
)
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
        numbers = hybrid_layers(pattern, _declared(owner))
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


def number_layers(model: nn.Module | Sequence[nn.Module], numbering: Numbering) -> None:
    """Say how the family of a ``HybridModel`` numbers its layers in Hugging Face's models.

    Needed where the pattern alone does not tell, before adapters are applied or loaded: ``M-M-*-``
    is Nemotron-H with six layers, and other families' with three.

    Args:
        model: The model, or the list of model chunks of this pipeline stage.
        numbering: ``pairs`` where attention and MLP share a number, as in Llama; ``positions``
            where each has its own, as in Nemotron-H.

    Raises:
        TargetError: The model is no ``HybridModel``, or cannot be numbered so.

    Collectives: none.
    """
    if numbering not in NUMBERINGS:
        raise TargetError(f"numbering={numbering!r}; wanted one of {', '.join(NUMBERINGS)}")
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    owners = [owner for chunk in chunks for owner in _hybrid_owners(chunk)]
    if not owners:
        raise TargetError(
            "the model is no HybridModel: its layers have the numbers that Hugging Face gives them"
        )
    for owner, pattern in owners:
        if None in hybrid_layers(pattern, numbering):
            raise TargetError(
                f"hybrid_layer_pattern {pattern!r} cannot be numbered by {numbering}: pairs are "
                "what mixes tokens and then what mixes channels, and positions are no groups"
            )
        setattr(owner, _NUMBERING, numbering)


def layer_numbering(model: nn.Module) -> Numbering | None:
    """How a model's layers are numbered; None where neither its pattern nor anybody has said so.

    Raises:
        TargetError: It holds two stacks that are numbered differently.
    """
    found = {
        _declared(owner) or hybrid_numbering(pattern) for owner, pattern in _hybrid_owners(model)
    }
    if len(found) > 1:
        raise TargetError(
            "the model holds stacks whose layers are numbered differently; pass one of them"
        )
    return found.pop() if found else "pairs"


def known_numbering(model: nn.Module) -> Numbering:
    """How a model's layers are numbered.

    Raises:
        TargetError: Neither its pattern nor anybody has said so.
    """
    numbering = layer_numbering(model)
    if numbering is None:
        raise TargetError(f"the model's layers have no numbers{_UNNUMBERED}")
    return numbering


def _declared(owner: nn.Module) -> Numbering | None:
    numbering: Numbering | None = getattr(owner, _NUMBERING, None)
    return numbering


def hybrid_numbers(model: nn.Module) -> dict[int, int]:
    """The decoder layer of each position of a ``HybridModel``; empty for a ``GPTModel``.

    Positions without a layer are left out.
    """
    return {
        position: number
        for owner, pattern in _hybrid_owners(model)
        for position, number in enumerate(hybrid_layers(pattern, _declared(owner)))
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
    for owner, pattern in _hybrid_owners(model):
        numbers = [n for n in hybrid_layers(pattern, _declared(owner)) if n is not None]
        return max(numbers) + 1 if numbers else 0
    for module in model.modules():
        layers = getattr(getattr(module, "config", None), "num_layers", None)
        if isinstance(layers, int):
            return layers
    raise TargetError("the model has no TransformerConfig to tell its number of layers")


def from_all_stages(own: T) -> list[T]:
    """What every pipeline stage has, in order, on every stage.

    Args:
        own: This stage's; it must pickle.

    Returns:
        One entry per stage; this rank's alone where there are no process groups.

    Collectives: one small all-gather over pipeline stages, if there are several.
    """
    if not parallel_state.model_parallel_is_initialized():
        return [own]
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return [own]
    stages: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(stages, own, group=group)
    return stages


def decoder_layer(full_name: str) -> tuple[int, str] | None:
    """A linear layer's decoder layer, counted over the pipeline, and its place there.

    Args:
        full_name: Such as ``decoder.layers.3.mlp.linear_fc1``.

    Returns:
        Such as ``(3, "mlp.linear_fc1")``; None outside a decoder.
    """
    found = _DECODER_LAYER.fullmatch(full_name)
    return (int(found.group(1)), found.group(2)) if found else None


def decoder_keys(
    full_name: str, projection: str, numbering: Numbering | None = "pairs"
) -> list[ModuleKey]:
    """The modules that one pair of factors of a decoder layer updates.

    Args:
        full_name: The Megatron-Core layer's name, as ``named_modules_global`` gives it.
        numbering: What ``layer_numbering`` says of the model.
        projection: The pair's projection; empty for the only one, or for all of a fused layer.

    Returns:
        One module, or every one of a fused layer.

    Raises:
        TargetError: No adapter format has a name for the layer.
    """
    number, hf_names = check_place(full_name, numbering)
    names = [hf_names[projection]] if projection in hf_names else list(hf_names.values())
    return [ModuleKey(layer=number, name=name) for name in names]


def check_place(
    full_name: str, numbering: Numbering | None = "pairs"
) -> tuple[int, Mapping[str, ModuleName]]:
    """A linear layer's decoder layer and the names of its projections.

    Args:
        full_name: As ``named_modules_global`` gives it.
        numbering: What ``layer_numbering`` says of the model.

    Raises:
        TargetError: No adapter format has a name for the layer.
    """
    place = decoder_layer(full_name)
    names = parts_of(place[1], numbering) if place and numbering else None
    if place is None or names is None:
        check_split(full_name)
        known = [
            linear.path for linear in ALL_LINEARS if linear.numbering == (numbering or "pairs")
        ]
        raise TargetError(
            f"{full_name} is none of a decoder layer's {', '.join(known)}{_why(full_name)}; no "
            "adapter format has a name for an adapter there: leave it out with exclude_modules, or "
            "take it out with remove_lora"
        )
    return place[0], names


def _why(full_name: str) -> str:
    if ".layers.position" in full_name:
        return _UNNUMBERED
    if full_name.endswith(("mixer.in_proj", "mixer.out_proj")):
        return (
            " (Mamba has a name where each position is a layer, as in Nemotron-H; if it is one, "
            'say so with number_layers(model, "positions"))'
        )
    return ""


def is_whole(full_name: str) -> bool:
    """Whether every rank has a layer's whole output: latent attention's down-projections."""
    return full_name.rpartition(".")[2] in _DOWN_PROJECTIONS


def check_split(full_name: str) -> None:
    """Refuse layers of which every rank computes the whole output.

    Raises:
        TargetError: It is a down-projection of latent attention.
    """
    if is_whole(full_name):
        raise TargetError(
            f"{full_name} is a down-projection of latent attention, whose output every "
            "tensor-parallel rank holds whole; an adapter there would be a replica on each rank, "
            "and its gradient a sum over ranks that this package does not send: leave it out of "
            "target_modules, or name it in exclude_modules"
        )
