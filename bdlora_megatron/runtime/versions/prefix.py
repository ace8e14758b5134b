"""Megatron-Core's prefix cache, made whole on every release that has one.

A block of the key-value cache that holds whole a stretch of a prompt has a name: a hash of the
prompt up to its end. A request whose prompt begins alike takes such blocks over and reads on behind
them. Blocks that nobody uses any more keep their names until others need the room.

What releases do wrong, and where that is mended here:

- 0.17 to 0.19: blocks that are only kept count as taken when a paused request wants one, until no
  request can go on (``resume_paused_requests``).
- 0.17 to 0.19: where all of a chunk is known, its last block is shared and written again
  (``_find_kv_match_count``).
- 0.17 to 0.19: a second block takes the name away from the first, whose children stay (``_name``).
- 0.17, 0.18: blocks about to be shared may be evicted for the very request that shares them
  (``_pinned``).
- 0.17, 0.18: a parent may be evicted before its child, whose lookup then fails
  (``_find_kv_match_count``).
- 0.17, 0.18: of requests that end in one step, a block of several is given back once
  (``release_memory_blocks_from_request_indexes``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from torch import Tensor

__all__ = ["PrefixContext", "with_prefix_cache"]

#: Beside what is needed, this share of all blocks is evicted at once: to look for the least
#: recently used one takes as long as there are blocks.
_EVICTED_SHARE = 32


def with_prefix_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """A context's arguments as ``context_arguments`` gives them since 0.17, with a prefix cache."""
    from megatron.core.inference.config import PrefixCachingEvictionPolicy

    settings = replace(
        arguments["inference_config"],
        enable_prefix_caching=True,
        # The other policy forgets a prompt with the last request that uses it.
        prefix_caching_eviction_policy=PrefixCachingEvictionPolicy.LRU,
    )
    return {**arguments, "inference_config": settings}


class PrefixContext(DynamicInferenceContext):
    """A dynamic context whose prefix cache can be relied on, where it has one.

    A request's ``precomputed_block_hashes`` name its blocks.

    Attributes:
        reused: By request, how many tokens it found in the cache when it first came.
    """

    kv_block_allocator: Any
    paused_request_count: int
    reused: dict[int, int]
    _span_end: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Allocate the cache.

        Args:
            *args: As for ``DynamicInferenceContext``.
            **kwargs: As for ``DynamicInferenceContext``.
        """
        super().__init__(*args, **kwargs)
        self.reused = {}
        if self.shares_blocks:
            blocks = self.kv_block_allocator
            blocks.register_kv_block_hashes = partial(_name, blocks)

    @property
    def shares_blocks(self) -> bool:
        """Whether there is a prefix cache."""
        return bool(getattr(self, "enable_prefix_caching", False))

    @property
    def cached_blocks(self) -> int:
        """Blocks that no request uses, and that are kept for those that may come."""
        return int(self.kv_block_allocator.get_evictable_block_count()) if self.shares_blocks else 0

    def check_availability(self, req: Any, *args: Any) -> Any:
        """Whether a request has room, in terms of Megatron-Core's own."""
        with self._pinned(req, req.remaining_prompt_length if self.shares_blocks else 0):
            return super().check_availability(req, *args)

    def add_request(self, req: Any, *args: Any, **kwargs: Any) -> None:
        """Add a request, or the next chunk of its prompt, and note what the cache saved it."""
        if not self.shares_blocks:
            super().add_request(req, *args, **kwargs)
            return
        length = kwargs.get("prefill_chunk_length", *args) or req.remaining_prompt_length
        with self._pinned(req, length):
            self._make_room(self._compute_prefix_match(req, length)[1])
            super().add_request(req, *args, **kwargs)
        if req.finished_chunk_token_count == 0:
            row = self.total_request_count - 1
            self.reused.setdefault(req.request_id, int(self.request_kv_length_offsets[row]))

    def resume_paused_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Let paused requests go on, each of which may want a block."""
        if self.shares_blocks:
            self._make_room(self.paused_request_count)
        return super().resume_paused_requests(*args, **kwargs)

    def release_memory_blocks_from_request_indexes(self, request_indexes: Tensor) -> None:
        """Give back the blocks of some rows."""
        if not self.shares_blocks:
            super().release_memory_blocks_from_request_indexes(request_indexes)
            return
        for index in request_indexes:
            super().release_memory_blocks_from_request_indexes(index[None])

    def _compute_prefix_match(self, req: Any, prefill_chunk_length: int, **more: Any) -> Any:
        # What is looked up below is not told where the chunk ends within its last block.
        self._span_end = req.finished_chunk_token_count + prefill_chunk_length
        return super()._compute_prefix_match(req, prefill_chunk_length, **more)

    def _find_kv_match_count(
        self, req: Any, start_block: int, end_block: int
    ) -> tuple[list[int], int]:
        """The blocks that are known already, and the last one's hash.

        They are taken over before a request has any of its own, and only such that leave two tokens
        of the chunk behind them: what others read is never written again, one token must be
        computed to choose the next, and kernels take a prompt's single token for an answer's.
        """
        hashes = req.precomputed_block_hashes
        if not self.shares_blocks or start_block:
            return [], 0
        known, found = self.kv_block_allocator.kv_hash_to_block_id, []
        most = max(self._span_end - 2, 0) // self.block_size_tokens
        for name in hashes[: min(end_block, most)]:
            if name not in known:
                break
            found.append(known[name])
        return found, hashes[len(found) - 1] if found else 0

    @contextmanager
    def _pinned(self, req: Any, length: int) -> Iterator[None]:
        """Count one more use of the blocks that a request is about to share."""
        matched = self._compute_prefix_match(req, length)[0] if self.shares_blocks else []
        if not matched:
            yield
            return
        counts = self.kv_block_allocator.block_ref_counts
        ids = torch.tensor(matched, dtype=torch.int64, device=counts.device)
        counts[ids] += 1
        try:
            yield
        finally:
            counts[ids] -= 1

    def _make_room(self, wanted: int) -> None:
        """Evict blocks that nobody uses, least recently used first, until so many are free."""
        blocks = self.kv_block_allocator
        short = wanted - int(blocks.total_avail)
        if short > 0:
            most = max(short, int(blocks.total_count) // _EVICTED_SHARE)
            blocks.evict_lru_blocks(min(most, self.cached_blocks))


def _name(
    blocks: Any, block_ids: list[int], block_hashes: list[int], parents: list[int] | None = None
) -> None:
    """Name blocks, up to the first whose name is another's already.

    Those behind it would be its children, and whoever uses them does not use it.
    """
    known = blocks.kv_hash_to_block_id
    count = next((i for i, name in enumerate(block_hashes) if name in known), len(block_hashes))
    more = () if parents is None else (parents[:count],)
    type(blocks).register_kv_block_hashes(blocks, block_ids[:count], block_hashes[:count], *more)
