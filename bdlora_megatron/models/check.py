"""Whether an adapter belongs to a base model."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from bdlora_megatron.convert.adapter import Adapter, BaseShape
from bdlora_megatron.convert.adapter.lazy import module_facts
from bdlora_megatron.convert.adapter.neutral import FUSED, PROJECTIONS
from bdlora_megatron.errors import ShapeError

if TYPE_CHECKING:
    from bdlora_megatron.models import HFConfig

__all__ = ["base_shape", "check_base"]


def check_base(adapter: Adapter, config: HFConfig) -> Adapter:
    """Refuse an adapter that was made for another base model.

    Args:
        adapter: Lazy or in memory; no module is loaded.
        config: The base model, as `read_hf_config` gives it.

    Returns:
        The same adapter, with all that the config tells of its base model.

    Raises:
        ShapeError: If a width, a number of heads or a layer is not the base model's. Both shapes
            are shown.
    """
    shape = base_shape(config)
    wrong = [
        f"{item.name} is {got} in the adapter and {wanted} in the base model"
        for item in fields(BaseShape)
        if (got := getattr(adapter.base, item.name)) is not None
        and got != (wanted := getattr(shape, item.name))
    ]
    last = max((key.layer for key in module_facts(adapter)), default=0)
    if last >= config.num_layers:
        wrong.append(
            f"layer {last} is adapted and the base model has {config.num_layers}, from 0 on"
        )
    if wrong:
        raise ShapeError(
            f"adapter {adapter.name!r} is for another base model: {'; '.join(wrong)}; pass the "
            f"base model that it was trained on (adapter {_shown(adapter.base)}; base model "
            f"{_shown(shape)})"
        )
    metadata = dict(adapter.metadata)
    if config.fused_projections:
        metadata[PROJECTIONS] = FUSED
    return replace(adapter, base=shape, metadata=metadata)


def base_shape(config: HFConfig) -> BaseShape:
    """What a base model's config tells of the sizes that adapters must fit.

    Args:
        config: The base model, as `read_hf_config` gives it.

    Returns:
        Its sizes, all of them known.
    """
    return BaseShape(
        hidden_size=config.hidden_size,
        ffn_size=config.ffn_size,
        q_size=config.num_heads * config.head_dim,
        kv_size=config.own_kv_heads * config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.own_kv_heads,
        head_dim=config.head_dim,
        num_layers=config.num_layers,
    )


def _shown(shape: BaseShape) -> str:
    known = {item.name: getattr(shape, item.name) for item in fields(BaseShape)}
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
