"""What differs for layers, their specifications and their checkpoints."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import package_info, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from bdlora_megatron.errors import UnsupportedError

__all__ = [
    "decoder_classes",
    "has_hybrid_model",
    "hybrid_norms",
    "nested_submodules",
    "sharded_by_stretch",
    "sharded_for_checkpoint",
    "share_quantization",
    "shares_kv_heads",
    "weight_is_rebuilt",
]


def sharded_for_checkpoint(
    state: dict[str, Any],
    prefix: str,
    axis: dict[str, int],
    offsets: Any,
    *,
    tp_group: Any,
    dp_cp_group: Any,
) -> dict[str, Any]:
    """Describe tensors to ``megatron.core.dist_checkpointing``.

    Args:
        state: Local tensors by name.
        prefix: Put before every name.
        axis: The dimension that tensor-parallel ranks split, by name; replicas are left out.
        offsets: Where pipeline stages split a stack of layers, as Megatron-Core passes it down.
        tp_group: The tensor-parallel group.
        dp_cp_group: The ranks that hold the same tensors; the global ones where unset.

    Raises:
        UnsupportedError: ``tp_group`` is not the global one and this release knows no other.
    """
    if not _knows_groups():
        if tp_group is not parallel_state.get_tensor_model_parallel_group():
            raise UnsupportedError(
                "a checkpoint of layers with a tensor-parallel group of their own needs "
                "Megatron-Core 0.16 or later; this one always asks for the global group"
            )
        return dict(make_sharded_tensors_for_checkpoint(state, prefix, axis, offsets))
    if dp_cp_group is None:
        dp_cp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return dict(
        make_sharded_tensors_for_checkpoint(
            state, prefix, axis, offsets, tp_group=tp_group, dp_cp_group=dp_cp_group
        )
    )


@functools.cache
def _knows_groups() -> bool:
    return "tp_group" in inspect.signature(make_sharded_tensors_for_checkpoint).parameters


def sharded_by_stretch(whole: Any, local: Mapping[str, int]) -> Any:
    """Describe a tensor whose rows are several stretches, each split over ranks by itself.

    Each stretch is a tensor of its own in the checkpoint, as Megatron-Core stores Mamba's and the
    delta net's input projections: their sizes differ, and its shards have one size.

    Args:
        whole: What ``sharded_for_checkpoint`` gave for this rank's rows.
        local: Rows of each stretch on this rank; its name ends the stretch's in the checkpoint.

    Returns:
        A ``ShardedTensorFactory``.
    """
    plain = whole.without_data()

    @torch.no_grad()
    def split(key: str, rows: torch.Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        own = replace(
            plain, key=key, data=rows, dtype=rows.dtype, replica_id=replica_id,
            flattened_range=flattened_range,
        )  # fmt: skip
        start, stretches = 0, []
        for name, size in local.items():
            for stretch in own.narrow(0, start, size):
                stretch.key = f"{key}.{name}"
                stretches.append(stretch)
            start += size
        return stretches

    return ShardedTensorFactory(
        whole.key, whole.data, split, lambda stretches: torch.cat(list(stretches)), whole.replica_id
    )


def has_hybrid_model() -> bool:
    """Whether ``HybridModel`` takes ``GPTModel``'s place in this release."""
    return (package_info.MAJOR, package_info.MINOR) >= (0, 19)


def decoder_classes() -> tuple[type, ...]:
    """The classes of a model's stack of decoder layers."""
    if not has_hybrid_model():
        return (TransformerBlock,)
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    return (TransformerBlock, HybridStack)


@contextmanager
def hybrid_norms() -> Iterator[None]:
    """Build a ``HybridModel`` inside this block where Transformer Engine may be missing.

    The stack's final norm is Transformer Engine's without a choice. Without it, the norm that a
    ``GPTModel`` would have takes its place.
    """
    from megatron.core.models.hybrid import hybrid_block

    own = hybrid_block.TENorm
    if not HAVE_TE:
        hybrid_block.TENorm = WrappedTorchNorm
    try:
        yield
    finally:
        hybrid_block.TENorm = own


def shares_kv_heads() -> bool:
    """Whether tensor-parallel ranks can be more than a model's key-value heads."""
    return (package_info.MAJOR, package_info.MINOR) >= (0, 16)


def nested_submodules(value: Any) -> Any:
    """The submodules inside one field of a layer specification.

    Args:
        value: A ``ModuleSpec``, a builder such as ``partial(MLP.as_mlp_submodule, ...)``, or a
            class.

    Returns:
        Its submodules, to be changed in place; None where it has none.
    """
    if isinstance(value, ModuleSpec):
        return value.submodules
    if isinstance(value, functools.partial):
        return value.keywords.get("submodules")
    return None


def share_quantization(source: Any, target: Any) -> None:
    """Let one Transformer Engine layer compute in the number formats that another was told."""
    if hasattr(source, "te_quant_params"):
        target.te_quant_params = source.te_quant_params


def weight_is_rebuilt(layer: Any) -> bool:
    """Whether a linear layer holds a part of its local weight and gathers the rest for each use.

    Returns:
        True under ``gtp_weight_remat_size > 1``.
    """
    return bool(getattr(layer, "gtp_remat_size", 1) > 1)
