"""Loading an adapter into a built model, at any tensor-parallel size and in any layout.

The layers get exactly the projections, ranks and scales that the adapter holds; each rank copies
its own share out of the whole factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bdlora_megatron.blocks import BlockFactors, pad_rank, replicate, reshard
from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter.lazy import LazyModules, module_facts
from bdlora_megatron.convert.adapter.neutral import Adapter as NeutralAdapter
from bdlora_megatron.convert.adapter.neutral import ModuleKey
from bdlora_megatron.convert.adapter.rows import in_layer_order
from bdlora_megatron.decoder import parts_of
from bdlora_megatron.errors import ShapeError, TargetError
from bdlora_megatron.layers.adapters import ProjectionPlan
from bdlora_megatron.layers.anatomy import (
    decoder_layer,
    known_numbering,
    named_modules_global,
    num_decoder_layers,
)
from bdlora_megatron.layers.apply import (
    check_backward,
    freeze_base,
    lora_layers,
    replace_module,
)
from bdlora_megatron.layers.classes import LINEAR_CLASSES, lora_layer
from bdlora_megatron.layers.geometry import LayerGeometry, Projection, check_own_heads
from bdlora_megatron.layers.lora_linear import LoRALinear

__all__ = [
    "DecoderLinear",
    "LoadOptions",
    "check_covered",
    "check_shapes",
    "decoder_linears",
    "fit",
    "in_models_names",
    "load_adapter",
]


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout(self.layout))


def load_adapter(
    model: nn.Module, adapter: NeutralAdapter, options: LoadOptions | None = None
) -> list[str]:
    """Load an adapter into a built model, replacing any adapter in it.

    Each layer computes the adapter's exact function, whatever the layout and the tensor-parallel
    size. Of an Activated LoRA, ``act_on`` must tell each batch's tokens.

    Args:
        model: A ``GPTModel``, a ``HybridModel``, or any module that holds their decoder layers.
        adapter: The adapter, as the readers in ``bdlora_megatron.convert`` return it.
        options: Layout, trainability, dropout, type.

    Returns:
        The full names of the layers on this pipeline stage that got a part of the adapter.

    Raises:
        ShapeError: Factors do not fit their layers. The error lists all of them, and the model is
            unchanged.
        TargetError: The adapter holds modules that the model does not have. Likewise.
        UnsupportedError: It is to be trained, and the model cannot be (``check_backward``), or
            repeats key-value heads to be served.

    Collectives: none in layouts ``bdlora`` and ``slora``; one broadcast for each replicated factor
    in ``half_sharded``.
    """
    options = options or LoadOptions()
    linears = decoder_linears(model)
    if options.trainable:
        check_backward(model)
        for target in linears:
            check_own_heads(target.full_name, target.module.config)
    adapter = in_models_names(adapter, linears)
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
            _load_layer(model, target, wanted, options, adapter.invocation_tokens)
            loaded.append(target.full_name)
    freeze_base(model)
    if not options.trainable:
        for parameter in model.parameters():
            parameter.requires_grad = False
    return loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLinear:
    """One linear layer of the decoder and the adapter modules that belong into it."""

    full_name: str
    module: Any
    in_features: int
    geometry: LayerGeometry
    keys: Mapping[str, ModuleKey]


def decoder_linears(model: nn.Module) -> list[DecoderLinear]:
    """The linear layers of a model's decoder that an adapter may change, on this pipeline stage."""
    targets = []
    numbering = known_numbering(model)
    for name, module in named_modules_global(model):
        place = decoder_layer(name)
        if place is None or not isinstance(module, LINEAR_CLASSES):
            continue
        number, path = place
        hf_names = parts_of(path, numbering)
        if hf_names is None or getattr(module, "is_expert", False):
            continue
        layer = module if isinstance(module, LoRALinear) else lora_layer(module)
        geometry = layer.geometry(path, fused=False)
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
    _check_one_decoder(targets)
    return targets


def _check_one_decoder(targets: list[DecoderLinear]) -> None:
    owners: dict[ModuleKey, str] = {}
    for target in targets:
        for key in target.keys.values():
            if owners.setdefault(key, target.full_name) != target.full_name:
                raise TargetError(
                    f"the model has two decoders: {key} is in {owners[key]} and in "
                    f"{target.full_name}; pass the one that the adapter is for"
                )


def in_models_names(adapter: NeutralAdapter, linears: list[DecoderLinear]) -> NeutralAdapter:
    """An adapter whose modules have the model's names for their paths.

    A ``q_proj`` without anything beside it does not tell what kind of attention it is of.
    """
    by_path = {str(key): key for target in linears for key in target.keys.values()}
    own = {by_path.get(str(key), key): key for key in adapter.modules}
    if all(name == key for name, key in own.items()):
        return adapter
    facts = module_facts(adapter)
    modules = LazyModules(
        {name: facts[key] for name, key in own.items()},
        lambda name: adapter.modules[own[name]],
        subject=f"cannot load adapter {adapter.name!r}",
        trusted=True,
    )
    return replace(adapter, modules=modules)


def check_covered(model: nn.Module, adapter: NeutralAdapter, linears: list[DecoderLinear]) -> None:
    """Refuse an adapter that holds modules which the model does not have.

    Raises:
        TargetError: It does; they are listed.
    """
    known = {key for target in linears for key in target.keys.values()}
    here = {key.layer for key in known}
    total = num_decoder_layers(model)
    # On a pipeline stage, other stages' layers are absent for a good reason.
    strange = [
        k for k in adapter.modules if k not in known and (k.layer in here or k.layer >= total)
    ]
    if strange:
        raise TargetError(
            f"adapter {adapter.name!r} has {len(strange)} modules that this model of {total} "
            f"layers does not have: {_some(strange)}; is it an adapter for another base model?"
        )


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
            wanted = (projection.own_features, target.in_features)
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
    invocation_tokens: tuple[int, ...] | None,
) -> None:
    layer = target.module
    if not isinstance(layer, LoRALinear):
        layer = lora_layer(layer)
        replace_module(model, target.module, layer)
    tp_size = layer.tp_group.size()
    projections = {projection.name: projection for projection in target.geometry.projections}
    fitted = {
        name: fit(factors, projections[name], options.layout, tp_size)
        for name, factors in wanted.items()
    }
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
        invocation_tokens=invocation_tokens,
    )
    for name, factors in fitted.items():
        adapter.load_whole(name, factors.A, factors.B)


def fit(
    factors: BlockFactors, projection: Projection, layout: Layout, tp_size: int
) -> BlockFactors:
    """Bring factors into a form that ``tp_size`` ranks can share in ``layout``; exact."""
    factors = in_layer_order(factors, projection.part_sizes, projection.groups)
    if projection.replicas > 1:
        # One head on each rank.
        factors = replicate(factors, tp_size // projection.replicas, projection.replicas)
    if layout is Layout.BDLORA:
        return factors if factors.num_blocks % tp_size == 0 else reshard(factors, tp_size)
    dense = reshard(factors, 1)
    if layout is Layout.SLORA:
        dense = pad_rank(dense, -(-dense.rank // tp_size) * tp_size)
    return dense
