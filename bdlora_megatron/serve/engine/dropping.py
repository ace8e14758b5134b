"""Megatron-Core's dynamic engine, with the ends, the drops and the names that it does not know."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from torch import Tensor

__all__ = ["DroppingEngine"]


class DroppingEngine(DynamicInferenceEngine):
    """Ends requests at any of several tokens, and drops them between steps.

    Attributes:
        hashes_of: Names the blocks of a request's prompt, given its tokens.
        finished: Requests that ended in the last step.
    """

    finished: frozenset[int] = frozenset()

    def __init__(
        self, *args: Any, hashes_of: Callable[[int, list[int]], list[int]], **kwargs: Any
    ) -> None:
        """Make an engine without requests.

        Args:
            *args: As for ``DynamicInferenceEngine``.
            hashes_of: See above.
            **kwargs: As for ``DynamicInferenceEngine``.
        """
        self.hashes_of = hashes_of
        super().__init__(*args, **kwargs)

    def add_request(self, request_id: int, *args: Any, **kwargs: Any) -> Any:
        """Add a request, as Megatron-Core does, and name its blocks."""
        future = super().add_request(request_id, *args, **kwargs)
        self._name_blocks([request_id])
        return future

    def _name_blocks(self, request_ids: Iterable[int]) -> None:
        """Name blocks after who uses them; Megatron-Core's own names tell tokens alone.

        A request that begins again has the tokens that it said in its prompt, and no names.
        """
        if self.context.shares_blocks:
            for request_id in request_ids:
                request = self.get_request(request_id)
                tokens = request.prompt_tokens.tolist()
                request.precomputed_block_hashes = self.hashes_of(request_id, tokens)

    def drop(self, request_ids: Collection[int]) -> None:
        """Forget requests and free their cache at once.

        Args:
            request_ids: Requests that were added and have not ended.
        """
        self._take_out(request_ids)
        for request_id in request_ids:
            if request_id in self.waiting_request_ids:
                self.waiting_request_ids.remove(request_id)
            self.requests.pop(request_id).future.cancel()

    def schedule_waiting_requests(self) -> None:
        """Choose what the coming step runs, as Megatron-Core does.

        A prompt that is read in chunks has a row between two of them, and a token that is
        overwritten by the next chunk. Where the next chunk finds no room, Megatron-Core 0.16.1
        runs that token, which overwrites keys and values of the prompt. Such a prompt gives its
        cache back instead, and is read from the start when there is room. Since 0.17 the prompt is
        set aside without a token, and that is done only where nothing runs that would make room.
        """
        if self.context.shares_blocks:
            self._put_off_who_would_wait()
        unfinished = self.context.chunked_prefill_request_id
        request = None if unfinished == -1 else self.get_request(unfinished)
        read = None if request is None else request.finished_chunk_token_count
        super().schedule_waiting_requests()
        if request is None or self.context.chunked_prefill_request_id != unfinished:
            return
        if self.context.unfinished_is_set_aside and self.context.active_ids:
            # It has no token, and there will be room when those that run have ended.
            return
        if request.finished_chunk_token_count == read:
            self._take_out({unfinished})
            request.finished_chunk_token_count = 0
            request.remaining_prompt_tokens = request.prompt_tokens.clone()
            self.evicted_request_count += 1

    def _put_off_who_would_wait(self) -> None:
        """Let those go last whose prompts begin with what an earlier one computes in this step.

        Megatron-Core lets them wait a step, and with the first of them all that stand behind it.
        """
        known: dict[int, int] = self.context.blocks.kv_hash_to_block_id
        pending: set[int] = set()
        waiting = list(self.waiting_request_ids)
        last = []
        for request_id in waiting:
            names = self.get_request(request_id).precomputed_block_hashes
            if not pending.isdisjoint(names):
                last.append(request_id)
            pending.update(name for name in names if name not in known)
        for request_id in last:
            self.waiting_request_ids.remove(request_id)
        self.waiting_request_ids.extend(last)

    def post_process_requests(
        self, request_ids: Tensor, finished: Tensor, evicted: Tensor | None, *args: Any, **more: Any
    ) -> Any:
        """Note which requests have ended, then go on as Megatron-Core does."""
        self.finished = frozenset(finished.tolist())
        done = super().post_process_requests(request_ids, finished, evicted, *args, **more)
        self._name_blocks([] if evicted is None else evicted.tolist())
        return done

    def _take_out(self, request_ids: Collection[int]) -> None:
        """Remove rows; requests that would then never wake up are started again."""
        stranded = self.context.remove_requests(request_ids)
        for request_id in stranded:
            self.requests[request_id].record.checkpoint()
        self._name_blocks(stranded)
        self.evicted_request_count += len(stranded)
        self.waiting_request_ids.extendleft(reversed(stranded))

    def _get_and_clear_stop_word_finished_ids(self, active_request_ids: list[int]) -> set[int]:
        # Asked between choosing the tokens and freeing the rows of those that have ended.
        choices, sampler = self.controller.choices, self.controller.sampler
        return {
            request_id
            for request_id in active_request_ids
            if request_id in choices
            and choices[request_id].token in sampler.of(request_id).stop_ids
        }
