"""Megatron-Core's dynamic context, which also knows the adapter slot of every request.

The context keeps the running requests in rows: paused ones first, then active ones. It moves rows
as requests come and go, and moves what is in ``request_metadata`` with them; that is where the
slot of each request stands, and from which position on it is used, so that one gather of each tells
the slot of each token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from bdlora_megatron.errors import CapacityError
from bdlora_megatron.layers.anatomy import attention_positions
from bdlora_megatron.runtime import cpu_is_enabled
from bdlora_megatron.runtime.versions.engine import SeamedContext, context_arguments
from bdlora_megatron.runtime.versions.known import prefix_caching
from bdlora_megatron.runtime.versions.prefix import with_prefix_cache
from bdlora_megatron.serve.engine.options import EngineOptions
from bdlora_megatron.serve.engine.prompts import Span

__all__ = ["AdapterContext", "UnpaddedContext", "make_context"]

_SLOT, _FIRST = "adapter_slot", "adapter_first_position"
#: Numbers of requests for which a decoding step is captured; a step is padded to the next one.
_GRAPHS = 16


class AdapterContext(SeamedContext):
    """A dynamic context whose requests have adapters.

    Attributes:
        slot_of: Gives the slot of a request that is about to run; -1 for the base model. The slot
            stays the request's until it is finished or taken out.
        first_of: Gives the position from which its slot is used; the base model runs before.
    """

    active_token_count: int
    layer_map: dict[int, int]
    paused_tokens: Any

    def __init__(
        self, *, slot_of: Callable[[int], int], first_of: Callable[[int], int], **settings: Any
    ) -> None:
        """Allocate the cache.

        Args:
            slot_of: See above.
            first_of: See above.
            **settings: As for ``DynamicInferenceContext``.
        """
        self.slot_of = slot_of
        self.first_of = first_of
        super().__init__(**settings)

    def add_columns(self) -> None:
        """Add columns for the slots."""
        self.add_column(_SLOT, -1)
        self.add_column(_FIRST, 0)

    def add_request(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """Add a request, or the next chunk of its prompt, with its adapter's slot."""
        super().add_request(req, *args, **kwargs)
        row = self.total_request_count - 1
        self.request_metadata[_SLOT][row] = self.slot_of(req.request_id)
        self.request_metadata[_FIRST][row] = self.first_of(req.request_id)

    def token_slots(self) -> Tensor:
        """The slot of each token of the coming step, int32, with -1 for padding."""
        slots = torch.full_like(self.token_to_request_idx[: self.padded_active_token_count], -1)
        active = self.active_token_count
        rows = self.token_to_request_idx[:active]
        acts = self.token_to_pos_ids[:active] >= self.request_metadata[_FIRST][rows]
        slots[:active] = self.request_metadata[_SLOT][rows].where(acts, -1).to(slots.dtype)
        # Since 0.18 rows and tokens are kept on the host.
        return slots.int().to(self.memory_buffer.device, non_blocking=True)

    @property
    def active_ids(self) -> list[int]:
        """The requests of the coming step, or of the step just run, in the order of its rows."""
        ids: list[int] = self.request_ids[
            self.paused_request_count : self.total_request_count
        ].tolist()
        return ids

    @property
    def spans(self) -> list[Span]:
        """Which tokens the coming step, or the step just run, has of which request, in order."""
        rows = slice(self.paused_request_count, self.total_request_count)
        firsts = self.request_kv_length_offsets[rows].tolist()
        lengths = self.request_query_lengths[rows].tolist()
        return [Span(*span) for span in zip(self.active_ids, firsts, lengths, strict=True)]

    @property
    def used_blocks(self) -> int:
        """Blocks of the cache that requests hold; those that are only kept do not count."""
        return int(self.blocks.get_total_used()) - self.cached_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache in all."""
        return int(self.blocks.total_count) - 1

    def remove_requests(self, request_ids: Collection[int]) -> list[int]:
        """Take requests out between two steps and free their blocks at once.

        Args:
            request_ids: Which; those that have no row are passed over.

        Returns:
            Paused requests that had to go with them, in the order in which to start them again:
            with no active request beside them, Megatron's engine would never wake them.
        """
        aside = self.unfinished_is_set_aside
        ids = self.request_ids[: self.total_request_count + aside].tolist()
        gone = [request_id in request_ids for request_id in ids]
        if not any(gone):
            return []
        paused = self.paused_request_count
        stranded = (
            [] if not all(gone[paused:]) else [i for i in ids[:paused] if i not in request_ids]
        )
        self._drop_rows([leaves or ids[row] in stranded for row, leaves in enumerate(gone)], aside)
        if self.chunked_prefill_request_id in request_ids:
            self.forget_unfinished()
        return stranded

    def _drop_rows(self, gone: list[bool], aside: bool) -> None:
        paused = self.paused_request_count
        mask = torch.tensor(gone, device=self.request_ids.device)
        self.release_memory_blocks_from_request_indexes(mask.nonzero()[:, 0])
        keep = (~mask).nonzero()[:, 0]
        for column in self.request_columns():
            column[: len(keep)] = column[keep]
        self.request_to_kv_block_ids[len(keep) : len(gone)] = -1
        kept_paused = paused - sum(gone[:paused])
        if kept_paused:
            self.paused_tokens = self.paused_tokens[keep[:kept_paused]]
        # A row that is set aside has no token.
        count = len(keep) - (aside and not gone[-1])
        # Between steps each active request has one token, at its row's place.
        tokens = keep[kept_paused:count] - paused
        for column in self.token_columns():
            column[: len(tokens)] = column[tokens]
        self.paused_request_count, self.total_request_count = kept_paused, count
        self.active_token_count = len(tokens)
        self.token_to_request_idx[: len(tokens)] = torch.arange(
            kept_paused, count, device=keep.device
        )


class UnpaddedContext(AdapterContext):
    """For CPUs, where padding a step to whole tiles costs time and saves none."""

    TOKEN_ROUNDER = 1
    REQUEST_ROUNDER = 1


def make_context(
    model: nn.Module,
    options: EngineOptions,
    slot_of: Callable[[int], int],
    first_of: Callable[[int], int],
) -> AdapterContext:
    """Allocate the cache for a model.

    Args:
        model: The model.
        options: Sizes.
        slot_of: See ``AdapterContext``.
        first_of: Likewise.

    Raises:
        CapacityError: It does not hold one request of ``max_model_len``.
        UnsupportedError: A prefix cache was asked for, and Megatron-Core has none.
    """
    kind = UnpaddedContext if cpu_is_enabled() else AdapterContext
    config: Any = model.config
    attention = attention_positions(model)
    if attention is not None:
        # Without Mamba, the context takes every position for one with attention.
        config = copy.copy(config)
        config.num_layers = len(attention)
    arguments = context_arguments(
        config,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        # A step is padded to whole tiles, up to this.
        max_tokens=kind.round_up_tokens(options.max_num_batched_tokens),
        block_size=options.block_size,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        cuda_graphs=_GRAPHS if options.cuda_graphs else None,
    )
    if prefix_caching(options.enable_prefix_caching):
        arguments = with_prefix_cache(arguments)
    context = kind(slot_of=slot_of, first_of=first_of, **arguments)
    if attention is not None:
        context.layer_map = attention
    needed = -(-options.max_model_len // options.block_size)
    if context.num_blocks < needed:
        block_bytes = context.block_size_bytes
        raise CapacityError(
            f"kv_cache_memory_bytes={options.kv_cache_memory_bytes} holds {context.num_blocks} "
            f"blocks of {options.block_size} tokens, and one request of "
            f"max_model_len={options.max_model_len} takes {needed}; set "
            f"kv_cache_memory_bytes={(needed + 1) * block_bytes} or more, or a smaller "
            "max_model_len"
        )
    return context
