"""Putting adapters into a built Megatron-Core model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError, TargetError, UnsupportedError
from bdlora_megatron.layers.anatomy import (
    check_place,
    check_split,
    from_all_stages,
    is_whole,
    layer_numbering,
    named_modules_global,
)
from bdlora_megatron.layers.classes import LINEAR_CLASSES, lora_layer
from bdlora_megatron.layers.lora_linear import LoRALinear
from bdlora_megatron.layers.targets import TargetMatcher
from bdlora_megatron.runtime.versions.layers import decoder_classes

__all__ = [
    "adapters_disabled",
    "apply_lora",
    "check_backward",
    "freeze_base",
    "lora_layers",
    "merge_adapters",
    "remove_lora",
    "replace_module",
    "unmerge_adapters",
]

_STACKS = decoder_classes()


def apply_lora(model: nn.Module | Sequence[nn.Module], lora: LoRAConfig) -> list[str]:
    """Put fresh adapters into a built model and freeze everything else.

    Layers are replaced in place and share their parameters with the old layers; nothing is copied.
    Call this before the model is wrapped in Megatron's DDP, whose buffers hold the trainable
    parameters.

    Args:
        model: A ``GPTModel``, a ``HybridModel``, or any module that holds Megatron-Core linear
            layers; or the list of model chunks of this pipeline stage.
        lora: Shape, scale, layout and targets of the adapters.

    Returns:
        The full names of the layers that got an adapter, with layer numbers counted over the whole
        pipeline.

    Raises:
        ConfigError: The model is wrapped already, has adapters already, or has sizes that
            do not divide evenly.
        TargetError: A target pattern matches no layer on any pipeline stage, a layer whose
            adapter no file format can name, such as ``output_layer``, or one that ranks do not
            split, such as a down-projection of latent attention.
        UnsupportedError: A matched layer is an expert, is quantised, or would split a key-value
            head; or latent attention would pass back a part of a gradient (``check_backward``).

    Collectives: none in the tensor-parallel group, except one broadcast per replicated factor in
    layout ``half_sharded``; one small all-gather over pipeline stages, if there are several.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    for chunk in chunks:
        _check_fresh(chunk)
        check_backward(chunk)
    matcher = TargetMatcher(lora.target_modules, lora.exclude_modules)
    candidates, chosen = {}, {}
    for chunk in chunks:
        for name, module in named_modules_global(chunk):
            if is_whole(name) and matcher.matches(name):
                check_split(name)
            if isinstance(module, LINEAR_CLASSES):
                candidates[name] = module
                if matcher.matches(name):
                    chosen[name] = module
    matcher.check_all_used(candidates, _unused_on_every_stage(matcher.unused))
    for chunk in chunks:
        _check_places(chunk, chosen)
    # All layers are made before the first is exchanged: a refusal leaves the model as it was.
    made = {name: _with_adapter(module, lora, name) for name, module in chosen.items()}
    for chunk in chunks:
        for name, module in chosen.items():
            replace_module(chunk, module, made[name])
        freeze_base(chunk)
    return list(made)


def _check_fresh(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise ConfigError(
                "the model is already wrapped in DistributedDataParallel, whose gradient buffers "
                "would miss the adapters; apply adapters before wrapping"
            )
        if isinstance(module, LoRALinear):
            raise ConfigError("the model already carries adapters; call remove_lora() first")


def check_backward(model: nn.Module) -> None:
    """Refuse to train a model whose own backward pass loses a part of a gradient.

    Latent attention's keys share one rotary part over all heads. Megatron-Core sums its gradient
    over the ranks that have those heads only where it gathers that part from sequence shards.

    Raises:
        UnsupportedError: Adapters in earlier layers would get a wrong gradient.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in ("linear_kv_down_proj", "linear_qkv_down_proj"):
            continue
        config: Any = model.get_submodule(name.rpartition(".")[0]).config
        whole = not isinstance(module, LINEAR_CLASSES)
        if config.tensor_model_parallel_size == 1 or (whole and config.sequence_parallel):
            continue
        raise UnsupportedError(
            f"{name} with tensor_model_parallel_size={config.tensor_model_parallel_size}, "
            f"sequence_parallel={config.sequence_parallel} and a down-projection that ranks "
            f"{'hold whole' if whole else 'split'}: Megatron-Core's latent attention then passes "
            "back only this rank's part of the gradient of the keys' rotary part, and every layer "
            "before it trains on that; set sequence_parallel=True and build it with Transformer "
            "Engine's layers, or train with one tensor-parallel rank"
        )


def _check_places(chunk: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers of a decoder's model for whose adapters no file format has a name.

    Raises:
        TargetError: There is one; an expert is for its own layer to refuse.
    """
    if not any(isinstance(module, _STACKS) for module in chunk.modules()):
        return
    numbering = layer_numbering(chunk)
    for name, module in named_modules_global(chunk):
        if chosen.get(name) is not module or getattr(module, "is_expert", False):
            continue
        _, known = check_place(name, numbering)
        geometry = lora_layer(module).geometry(name, fused=False)
        unnamed = [p.name for p in geometry.projections if p.name and p.name not in known]
        if unnamed:
            raise TargetError(
                f"{name} holds {', '.join(unnamed)}, and models whose layers are numbered by "
                f"{numbering} have {', '.join(known.values())} there; leave it out with "
                "exclude_modules, or number the model otherwise with number_layers"
            )


def _with_adapter(module: nn.Module, lora: LoRAConfig, name: str) -> LoRALinear:
    layer = lora_layer(module)
    layer.attach_config(lora, name)
    return layer


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` hangs in ``model``."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def _unused_on_every_stage(unused: Sequence[str]) -> list[str]:
    answers = from_all_stages(list(unused))
    return [name for name in unused if all(name in answer for answer in answers)]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers that can carry an adapter, by full name."""
    for name, module in named_modules_global(model):
        if isinstance(module, LoRALinear):
            yield name, module


def freeze_base(model: nn.Module) -> None:
    """Leave only adapter parameters trainable.

    Also makes the decoder's input require a gradient where activations are recomputed, at any
    granularity: a checkpointed part whose inputs need no gradient records no backward, and cuts the
    adapters in it off.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    for _, layer in lora_layers(model):
        if layer.adapter is not None:
            layer.adapter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, _STACKS):
            _hook_once(module)


def _hook_once(block: nn.Module) -> None:
    if _require_input_grad not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_require_input_grad, with_kwargs=True)


def _require_input_grad(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config: Any = module.config
    # Asked at each call: a host may choose what to recompute after the adapters are in.
    if config.recompute_granularity is None or not torch.is_grad_enabled():
        return args, kwargs
    if args:
        return (_requiring(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _requiring(kwargs.get("hidden_states"))}


def _requiring(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.requires_grad:
        return x
    return x.detach().requires_grad_(True)


def remove_lora(model: nn.Module, *, keep_merged: bool = False) -> None:
    """Remove all adapters and restore the plain Megatron-Core layers; the base stays unchanged.

    Parameters stay frozen.

    Args:
        model: A model with adapters, or without.
        keep_merged: Keep the updates that ``merge_adapters`` added to the weights: the remaining
            model computes, and saves, base and adapter together.
    """
    for _, layer in list(lora_layers(model)):
        replace_module(model, layer, layer.to_base(keep_merged=keep_merged))


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to its base weight; ``LoRALinear.merge`` describes the cost."""
    for _, layer in lora_layers(model):
        if layer.adapter is not None:
            layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Restore every merged base weight, bit for bit."""
    for _, layer in lora_layers(model):
        if layer.is_merged:
            layer.unmerge()


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model alone inside the ``with`` block, even if adapters are merged."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.adapter_enabled for layer in layers]
    with ExitStack() as stack:
        for layer in layers:
            layer.adapter_enabled = False
            stack.enter_context(layer.base_weight())
        try:
            yield
        finally:
            for layer, enabled in zip(layers, before, strict=True):
                layer.adapter_enabled = enabled
