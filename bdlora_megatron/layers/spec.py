"""Building a new model with adapters in it, from a Megatron-Core layer specification."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers.anatomy import check_split
from bdlora_megatron.layers.classes import LORA_CLASSES
from bdlora_megatron.layers.targets import TargetMatcher
from bdlora_megatron.runtime.versions.layers import nested_submodules

__all__ = ["lora_spec"]


def lora_spec(spec: Any, config: Any, lora: LoRAConfig) -> Any:
    """Replace the targeted linear layers of a specification by layers with adapters.

    Freeze the base with ``freeze_base(model)`` once the model is built and its weights are loaded.

    Args:
        spec: The ``ModuleSpec`` of one decoder layer, or ``TransformerBlockSubmodules`` with one
            per layer of this pipeline stage.
        config: The model's ``TransformerConfig``.
        lora: Shape, scale, layout and targets of the adapters.

    Returns:
        A specification of the same kind; ``spec`` is not changed.

    Raises:
        ConfigError: ``lora`` targets only some layers, and ``spec`` describes a single one.
        TargetError: A target pattern matches no layer, or one that ranks do not split.
    """
    matcher = TargetMatcher(lora.target_modules, lora.exclude_modules)
    if isinstance(spec, TransformerBlockSubmodules):
        new, candidates = _per_layer(spec, config, lora, matcher)
    else:
        new = deepcopy(spec)
        candidates = _same_in_all(new, config.num_layers, lora, matcher)
    matcher.check_all_used(candidates)
    return new


def _per_layer(
    spec: TransformerBlockSubmodules, config: Any, lora: LoRAConfig, matcher: TargetMatcher
) -> tuple[TransformerBlockSubmodules, list[str]]:
    offset = get_transformer_layer_offset(config)
    candidates = []
    # Specifications of equal layers are often one shared object; each layer gets its own.
    new = TransformerBlockSubmodules(
        layer_specs=[deepcopy(layer) for layer in spec.layer_specs], layer_norm=spec.layer_norm
    )
    for index, layer in enumerate(new.layer_specs):
        for path, holder, field in list(_linears(layer.submodules, "")):
            candidates.append(f"decoder.layers.{offset + index}.{path}")
            if matcher.matches(candidates[-1]):
                _exchange(holder, field, path, lora)
    return new, candidates


def _same_in_all(
    layer: ModuleSpec, num_layers: int, lora: LoRAConfig, matcher: TargetMatcher
) -> list[str]:
    candidates = []
    for path, holder, field in list(_linears(layer.submodules, "")):
        names = [f"decoder.layers.{index}.{path}" for index in range(num_layers)]
        candidates += names
        hits = sum(matcher.matches(name) for name in names)
        if 0 < hits < num_layers:
            raise ConfigError(
                f"the targets choose {path} in {hits} of {num_layers} layers, but one layer's "
                "specification serves all of them; pass TransformerBlockSubmodules, such as "
                "get_gpt_decoder_block_spec() returns, or use apply_lora() on the built model"
            )
        if hits:
            _exchange(holder, field, path, lora)
    return candidates


def _linears(submodules: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    """Where linear layers that can carry an adapter stand: name, owner, the owner's field."""
    if not is_dataclass(submodules):
        return
    for field in fields(submodules):
        value = getattr(submodules, field.name)
        full = f"{path}.{field.name}" if path else field.name
        if _linear_class(value) is not None:
            yield full, submodules, field.name
        else:
            yield from _linears(nested_submodules(value), full)


def _linear_class(value: Any) -> type | None:
    kind = value.module if isinstance(value, ModuleSpec) else value
    return kind if isinstance(kind, type) and kind in LORA_CLASSES else None


def _exchange(holder: Any, field: str, path: str, lora: LoRAConfig) -> None:
    check_split(path)
    value = getattr(holder, field)
    params = dict(value.params) if isinstance(value, ModuleSpec) else {}
    kind = _linear_class(value)
    assert kind is not None
    new = ModuleSpec(module=LORA_CLASSES[kind], params={**params, "lora": lora, "lora_name": path})
    setattr(holder, field, new)
