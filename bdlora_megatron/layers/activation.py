"""Training an Activated LoRA: which tokens of a batch its layers act on.

Where it does not act, the product at the rank is zero: so is what it adds, and so is every gradient
that it would pass. Nothing is exchanged for that; every rank has the whole mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.invocation import active_from
from bdlora_megatron.layers.adapters import Adapter

__all__ = ["act_on", "active_tokens", "invocation_of"]


def active_tokens(input_ids: Tensor, invocation_tokens: tuple[int, ...]) -> Tensor:
    """The tokens on which an Activated LoRA acts, row by row, as PEFT finds them.

    Args:
        input_ids: ``[b, S]``, each row a text of its own.
        invocation_tokens: The adapter's.

    Returns:
        ``[b, S]``: True from the last occurrence's first token on; a row without has none.
    """
    acts = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, tokens in zip(acts, input_ids.tolist(), strict=True):
        first = active_from(tokens, invocation_tokens)
        if first is not None:
            row[first:] = True
    return acts.to(input_ids.device)


def act_on(model: nn.Module, acts: Tensor, *, in_turn: bool = False) -> None:
    """Say which tokens of the coming forward and backward pass a model's adapter acts on.

    It holds until it is said again. A model whose adapter acts everywhere, or that has none on
    this pipeline stage, does not look at it.

    Args:
        model: A model with an adapter that has ``invocation_tokens``, wrapped or not.
        acts: ``[b, S]``, bool, as ``active_tokens`` gives it: the same on every tensor-parallel
            rank, and whole under sequence parallelism.
        in_turn: The caller's promise that each forward pass is followed by its backward pass before
            the next batch is told. Where activations are recomputed, layers look at the mask again
            in backward.

    Raises:
        ConfigError: It is no mask.
        UnsupportedError: Activations are recomputed, and passes do not come in turn.

    Collectives: none.
    """
    if acts.ndim != 2 or acts.dtype != torch.bool:
        raise ConfigError(
            f"acts is {acts.dtype} {list(acts.shape)}, wanted bool [b, S]; active_tokens makes it"
        )
    adapters = [m for m in model.modules() if isinstance(m, Adapter) and m.invocation_tokens]
    if adapters and torch.is_grad_enabled():
        _check_recompute(model, in_turn)
    # Megatron-Core's tokens stand sequence by batch.
    flat = acts.t().flatten()
    for adapter in adapters:
        adapter.acts = flat


def _check_recompute(model: nn.Module, in_turn: bool) -> None:
    config: Any = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    recomputed = getattr(config, "recompute_granularity", None)
    stages = getattr(config, "pipeline_model_parallel_size", 1)
    if recomputed is None or (in_turn and stages == 1):
        return
    raise UnsupportedError(
        f"recompute_granularity={recomputed!r} with pipeline_model_parallel_size={stages} and "
        f"in_turn={in_turn}: a layer that is recomputed would take a later batch's mask for its "
        "own; turn recomputing off, or run each batch's backward pass before the next forward "
        "pass, on one stage, and say so with in_turn=True"
    )


def invocation_of(model: nn.Module) -> tuple[int, ...] | None:
    """The tokens from which a model's adapter acts; None for everywhere, or without an adapter."""
    adapters = (module for module in model.modules() if isinstance(module, Adapter))
    return next((adapter.invocation_tokens for adapter in adapters), None)
