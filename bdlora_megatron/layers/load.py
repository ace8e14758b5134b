"""Loading an adapter into a built model, at any tensor-parallel size and in any layout.

The layers get exactly the projections, ranks and scales that the adapter holds; each rank copies
its own share out of the whole factors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bdlora_megatron.blocks import BlockFactors, pad_rank, reshard
from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter.neutral import Adapter as NeutralAdapter
from bdlora_megatron.convert.adapter.neutral import ModuleKey, ModuleName
from bdlora_megatron.errors import ShapeError, TargetError
from bdlora_megatron.layers.adapters import ProjectionPlan
from bdlora_megatron.layers.apply import (
    freeze_base,
    lora_layers,
    named_modules_global,
    replace_module,
)
from bdlora_megatron.layers.classes import LINEAR_CLASSES, lora_layer
from bdlora_megatron.layers.geometry import LayerGeometry
from bdlora_megatron.layers.lora_linear import LoRALinear

__all__ = [
    "HF_NAMES",
    "DecoderLinear",
    "LoadOptions",
    "check_covered",
    "check_shapes",
    "decoder_keys",
    "decoder_layer",
    "decoder_linears",
    "fit",
    "load_adapter",
]

#: Hugging Face's name of each projection of a Megatron-Core layer.
HF_NAMES: Mapping[str, Mapping[str, ModuleName]] = {
    "linear_qkv": {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    "linear_proj": {"": "o_proj"},
    "linear_fc1": {"gate": "gate_proj", "up": "up_proj"},
    "linear_fc2": {"": "down_proj"},
}
_DECODER_LAYER = re.compile(r"(?:.*\.)?decoder\.layers\.(\d+)\..*?([^.]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How an adapter is put into the layers.

    Attributes:
        layout: How ranks split the factors. ``bdlora`` serves any adapter without communication; a
            vanilla one, or one whose blocks do not divide over the ranks, then costs each rank the
            whole of its dense factor. ``slora`` and ``half_sharded`` hold vanilla adapters as they
            are, and block-diagonal ones densely.
        trainable: Leave the factors trainable; everything else is frozen.
        dropout: For training.
        dtype: The factors' type; the base weight's when unset.
    """

    layout: Layout = Layout.BDLORA
    trainable: bool = False
    dropout: float = 0.0
    dtype: torch.dtype | None = None


def load_adapter(
    model: nn.Module, adapter: NeutralAdapter, options: LoadOptions | None = None
) -> list[str]:
    """Put an adapter into a built model, replacing any that is there.

    The function each layer computes is the adapter's own, whatever the layout and the
    tensor-parallel size: resharding is exact.

    Args:
        model: A ``GPTModel``, or any module that holds Megatron-Core decoder layers.
        adapter: What to load, as the readers in ``bdlora_megatron.convert`` return it.
        options: Layout, trainability, dropout, type.

    Returns:
        The full names of the layers that carry a part of it on this pipeline stage.

    Raises:
        ShapeError: A factor does not fit its layer; all that do not are listed, and the model is
            left as it was.
        TargetError: The adapter holds modules that the model does not have; likewise.

    Collectives: none in layouts ``bdlora`` and ``slora``; one broadcast for each replicated factor
    in ``half_sharded``.
    """
    options = options or LoadOptions()
    linears = decoder_linears(model)
    check_covered(model, adapter, linears)
    check_shapes(adapter, linears)
    for _, layer in lora_layers(model):
        if layer.is_merged:
            layer.unmerge()
        layer.adapter = None
    loaded = []
    for target in linears:
        wanted = {
            projection: adapter.modules[key]
            for projection, key in target.keys.items()
            if key in adapter.modules
        }
        if wanted:
            _load_layer(model, target, wanted, options)
            loaded.append(target.full_name)
    freeze_base(model)
    if not options.trainable:
        for parameter in model.parameters():
            parameter.requires_grad = False
    return loaded


def decoder_keys(full_name: str, projection: str) -> list[ModuleKey]:
    """The modules that one pair of factors of a decoder layer updates.

    Args:
        full_name: The Megatron-Core layer's name, its decoder layer numbered over the whole model.
        projection: The pair's projection; empty for the only one, or for all of a fused layer.

    Returns:
        One module, or every one of a fused layer.

    Raises:
        TargetError: The layer is none of a decoder's four.
    """
    place = decoder_layer(full_name)
    hf_names = HF_NAMES.get(place[1]) if place else None
    if place is None or hf_names is None:
        raise TargetError(
            f"{full_name} carries an adapter and is none of a decoder layer's "
            f"{', '.join(HF_NAMES)}; no adapter format has a place for it: remove_lora it first"
        )
    names = [hf_names[projection]] if projection in hf_names else list(hf_names.values())
    return [ModuleKey(layer=place[0], name=name) for name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLinear:
    """One linear layer of the decoder and the adapter modules that belong into it."""

    full_name: str
    module: Any
    in_features: int
    geometry: LayerGeometry
    keys: Mapping[str, ModuleKey]


def decoder_layer(full_name: str) -> tuple[int, str] | None:
    """A linear layer's decoder layer, counted over the pipeline, and its own name there.

    Args:
        full_name: Such as ``decoder.layers.3.mlp.linear_fc1``.

    Returns:
        Such as ``(3, "linear_fc1")``; None outside a decoder.
    """
    found = _DECODER_LAYER.fullmatch(full_name)
    return (int(found.group(1)), found.group(2)) if found else None


def decoder_linears(model: nn.Module) -> list[DecoderLinear]:
    """The linear layers of a model's decoder that an adapter may change, on this pipeline stage."""
    targets = []
    for name, module in named_modules_global(model):
        place = decoder_layer(name)
        if place is None or not isinstance(module, LINEAR_CLASSES):
            continue
        number, own = place
        hf_names = HF_NAMES.get(own)
        if hf_names is None or getattr(module, "is_expert", False):
            continue
        layer = module if isinstance(module, LoRALinear) else lora_layer(module)
        geometry = layer.geometry(own, fused=False)
        keys = {
            projection.name: ModuleKey(layer=number, name=hf_names[projection.name])
            for projection in geometry.projections
            if projection.name in hf_names
        }
        targets.append(
            DecoderLinear(
                full_name=name,
                module=module,
                in_features=layer.input_size,
                geometry=geometry,
                keys=keys,
            )
        )
    return targets


def check_covered(model: nn.Module, adapter: NeutralAdapter, linears: list[DecoderLinear]) -> None:
    """Refuse an adapter that holds modules which the model does not have.

    Raises:
        TargetError: It does; they are listed.
    """
    known = {key for target in linears for key in target.keys.values()}
    here = {key.layer for key in known}
    total = _num_layers(model)
    # On a pipeline stage, other stages' layers are absent for a good reason.
    strange = [
        k for k in adapter.modules if k not in known and (k.layer in here or k.layer >= total)
    ]
    if strange:
        raise TargetError(
            f"adapter {adapter.name!r} has {len(strange)} modules that this model of {total} "
            f"layers does not have: {_some(strange)}; is it an adapter for another base model?"
        )


def _num_layers(model: nn.Module) -> int:
    for module in model.modules():
        layers = getattr(getattr(module, "config", None), "num_layers", None)
        if isinstance(layers, int):
            return layers
    raise TargetError("the model has no TransformerConfig to tell its number of layers")


def check_shapes(adapter: NeutralAdapter, linears: list[DecoderLinear]) -> None:
    """Refuse an adapter whose factors do not fit the model's layers.

    Raises:
        ShapeError: They do not; those that do not are listed.
    """
    problems = []
    for target in linears:
        for projection in target.geometry.projections:
            key = target.keys.get(projection.name)
            factors = None if key is None else adapter.modules.get(key)
            wanted = (projection.out_features, target.in_features)
            if factors is not None and (factors.out_features, factors.in_features) != wanted:
                got = (factors.out_features, factors.in_features)
                problems.append(f"{key}: the adapter is for {got}, the layer is {wanted}")
    if problems:
        raise ShapeError(
            f"adapter {adapter.name!r} does not fit the base model in {len(problems)} modules "
            f"([out, in] sizes): {_some(problems)}; is it an adapter for another base model?"
        )


def _some(items: list[Any]) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return "; ".join(map(str, items[:8])) + more


def _load_layer(
    model: nn.Module,
    target: DecoderLinear,
    wanted: Mapping[str, BlockFactors],
    options: LoadOptions,
) -> None:
    layer = target.module
    if not isinstance(layer, LoRALinear):
        layer = lora_layer(layer)
        replace_module(model, target.module, layer)
    tp_size = layer.tp_group.size()
    fitted = {name: fit(factors, options.layout, tp_size) for name, factors in wanted.items()}
    plans = [
        ProjectionPlan(
            projection=projection,
            rank=fitted[projection.name].rank,
            num_blocks=fitted[projection.name].num_blocks,
            scale=fitted[projection.name].scale,
        )
        for projection in target.geometry.projections
        if projection.name in fitted
    ]
    adapter = layer.attach(
        plans,
        target.geometry,
        layout=options.layout,
        dropout=options.dropout,
        dtype=options.dtype,
    )
    for name, factors in fitted.items():
        adapter.load_whole(name, factors.A, factors.B)


def fit(factors: BlockFactors, layout: Layout, tp_size: int) -> BlockFactors:
    """Bring factors into a form that ``tp_size`` ranks can share in ``layout``; exact."""
    if layout is Layout.BDLORA:
        return factors if factors.num_blocks % tp_size == 0 else reshard(factors, tp_size)
    dense = reshard(factors, 1)
    if layout is Layout.SLORA:
        dense = pad_rank(dense, -(-dense.rank // tp_size) * tp_size)
    return dense
