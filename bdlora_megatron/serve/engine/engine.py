"""Megatron-Core's dynamic engine, one step at a time, with an adapter for every request.

Megatron-Core batches, schedules prompts in chunks, and keeps the cache. Added are the adapters:
requests wait here until theirs is in a slot, keep the slot while they run, and give it back.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from torch import nn

from bdlora_megatron.errors import CapacityError, ConfigError
from bdlora_megatron.invocation import active_from
from bdlora_megatron.runtime.versions.engine import engine_arguments, steps_run, wrapper_arguments
from bdlora_megatron.runtime.versions.known import require_engine
from bdlora_megatron.serve.engine.admission import Admission, Admitted, Refused, Take
from bdlora_megatron.serve.engine.context import make_context
from bdlora_megatron.serve.engine.controller import AdapterController, AdapterGPT
from bdlora_megatron.serve.engine.dropping import DroppingEngine
from bdlora_megatron.serve.engine.options import EngineOptions
from bdlora_megatron.serve.engine.prefix import Names, block_hashes, names_of
from bdlora_megatron.serve.engine.prompts import PromptScores
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import (
    Failed,
    FinishReason,
    Places,
    Snapshot,
    Submit,
    Token,
    Vocabulary,
)
from bdlora_megatron.serve.store import AdapterStore
from bdlora_megatron.serve.store_types import AdapterKey

__all__ = ["ServingEngine"]

logger = logging.getLogger(__name__)


class ServingEngine:
    """Requests in, tokens out, one step at a time.

    Every rank makes the same calls in the same order. Then all ranks schedule alike and choose the
    same tokens.

    Collectives: those of the model's forward pass, and in ``step`` those of
    ``AdapterStore.advance``.
    """

    def __init__(
        self,
        model: nn.Module,
        store: AdapterStore | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        """Allocate the cache around a model.

        Args:
            model: In its place on the device; it is put into evaluation mode.
            store: The adapters; None serves the base model alone.
            options: Sizes.

        Raises:
            CapacityError: ``kv_cache_memory_bytes`` does not hold one request of ``max_model_len``.
            UnsupportedError: The installed Megatron-Core's engine is not known here, or has no
                prefix cache and ``enable_prefix_caching`` asks for one.
        """
        require_engine()
        self.options = options or EngineOptions()
        self.store = store
        self.admission = Admission(
            patience=self.options.patience_steps,
            lookahead=1 if store is None else min(store.slots.num_slots, store.host_capacity),
            per_adapter=self.options.max_per_adapter,
        )
        self._sampler = Sampler()
        self._scores = PromptScores()
        self._waiting: dict[int, Submit] = {}
        # The version that each running request holds; None for the base model.
        self._running: dict[int, AdapterKey | None] = {}
        # From which position on each uses its version: one of an Activated LoRA, from its prompt's
        # last invocation, and never where there is none.
        self._first: dict[int, int] = {}
        # How each one's blocks are named, and its prompt's length until its first token; of those
        # that may use the prefix cache.
        self._names: dict[int, Names] = {}
        self._unanswered: dict[int, int] = {}
        self._prefix_queries = self._prefix_hits = 0
        self._context = make_context(model, self.options, self._slot_of, self._first.__getitem__)
        slots = None if store is None else store.slots
        wrapped = AdapterGPT(
            *wrapper_arguments(model, self._context),
            slots=slots,
            slots_in_use=self._slots_in_use,
            scores=self._scores,
        )
        wrapped.prep_model_for_inference()
        self._controller = AdapterController(wrapped, self._sampler)
        self._engine = DroppingEngine(
            self._controller, self._context, hashes_of=self._hashes_of, **engine_arguments()
        )
        unset = self.options.enable_prefix_caching is None
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        if unset and first and not self._context.shares_blocks:
            logger.warning(
                "no prefix cache: every prompt is computed whole; Megatron-Core has one since 0.17"
            )

    @property
    def vocab_size(self) -> int:
        """Token ids end below this."""
        return int(self._controller.inference_wrapped_model.model.vocab_size)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def learn(self, vocabulary: Vocabulary) -> None:
        """Know the tokens of grammars that requests will name."""
        self._sampler.masks.learn(vocabulary)

    def submit(self, request: Submit) -> None:
        """Take a request into the queue.

        Raises:
            CapacityError: It could never run: prompt and answer are longer than ``max_model_len``.
            ConfigError: The prompt is empty, or it or the settings hold what are no token ids, or
                a grammar names a vocabulary that is not known.
        """
        sampling = request.sampling
        total = len(request.prompt) + sampling.max_tokens
        if not request.prompt:
            raise ConfigError("the prompt has no tokens; send at least one")
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab_size:
            raise ConfigError(f"the prompt has token ids beyond 0 to {self.vocab_size - 1}")
        named = {*dict(sampling.logit_bias), *(sampling.stop_ids if sampling.min_tokens else ())}
        if named and not 0 <= min(named) <= max(named) < self.vocab_size:
            raise ConfigError(
                f"logit_bias or stop_token_ids has token ids beyond 0 to {self.vocab_size - 1}"
            )
        if total > self.options.max_model_len:
            raise CapacityError(
                f"{len(request.prompt)} tokens of prompt and max_tokens="
                f"{sampling.max_tokens} are {total}, and requests have room for "
                f"{self.options.max_model_len}; shorten the prompt or lower max_tokens"
            )
        self._sampler.masks.prepare(sampling.grammar)
        store, adapter = self.store, request.adapter
        if store is not None and adapter in store.names:
            # A load that failed refuses those who waited for it; who comes later has another try.
            store.forget_error(store.key(adapter))
        self._waiting[request.request_id] = request
        self.admission.add(request.request_id, request.adapter)

    def cancel(self, request_id: int) -> None:
        """Drop a request and free its cache at once; one that has ended is passed over."""
        if self._waiting.pop(request_id, None) is not None:
            self.admission.remove(request_id)
        elif request_id in self._running:
            self._engine.drop({request_id})
            self._end(request_id)

    def uses(self, adapter: str) -> int:
        """Requests of an adapter, waiting and running."""
        return self.admission.uses(adapter)

    def step(self, *, wait_s: float = 0.0) -> list[Token | Failed]:
        """Run one step: let requests in, run the model once, choose a token each.

        Args:
            wait_s: Where nothing runs, how long to wait for adapters that are being loaded.

        Returns:
            What the requests got, in the order of their rows.
        """
        if self.store is not None:
            self.store.advance(wait_s=0.0 if self._running else wait_s)
        events: list[Token | Failed] = self._admit()
        self._controller.choices = {}
        self._engine.finished = frozenset()
        if self._running:
            self._engine.step_modern()
        for request_id, choice in self._controller.choices.items():
            fault = self._sampler.masks.faults.get(request_id)
            if fault is not None:
                self._drop_faulty(request_id)
                events.append(Failed(request_id, fault, ConfigError.__name__))
                continue
            finish = self._finish(request_id, choice.token)
            prompt, cached = self._scores.take(request_id), self._cached(request_id)
            events.append(Token(request_id, choice, finish, prompt, cached))
            if finish is not None:
                self._end(request_id)
        return events

    def _drop_faulty(self, request_id: int) -> None:
        if request_id not in self._engine.finished:
            self._engine.drop({request_id})
        self._end(request_id)

    def snapshot(self) -> Snapshot:
        """The engine in numbers."""
        counts: dict[str, Any] = {}
        if self.store is not None:
            allocator, stats = self.store.slots.allocator, self.store.stats
            counts = {
                "slots_in_use": allocator.num_slots - allocator.available,
                "num_slots": allocator.num_slots,
                "host_bytes": self.store.host_bytes_used,
                "slot_hits": stats.slot_hits,
                "slot_loads": stats.slot_loads,
                "slot_evictions": stats.slot_evictions,
                "host_loads": stats.host_loads,
                "host_evictions": stats.host_evictions,
                "load_failures": stats.failures,
            }
        return Snapshot(
            running=len(self._running),
            queued=len(self._waiting),
            used_blocks=self._context.used_blocks,
            cached_blocks=self._context.cached_blocks,
            num_blocks=self._context.num_blocks,
            prefix_cache_queries=self._prefix_queries,
            prefix_cache_hits=self._prefix_hits,
            preemptions=self._engine.evicted_request_count,
            steps=steps_run(self._engine),
            running_adapters=_counts(key.name for key in self._running.values() if key is not None),
            waiting_adapters=_counts(request.adapter for request in self._waiting.values()),
            **counts,
        )

    def places(self) -> Places:
        """Where adapters are; this looks at each of them."""
        return Places() if self.store is None else self.store.places()

    def _admit(self) -> list[Token | Failed]:
        # Megatron's own queue holds what it has no cache for yet, and it goes first.
        capacity = 0
        if not self._engine.waiting_request_ids:
            capacity = self.options.max_num_seqs - len(self._running)
        failed: list[Token | Failed] = []
        for left in self.admission.admit(capacity, self):
            request = self._waiting.pop(left.request_id)
            if isinstance(left, Refused):
                failed.append(Failed(left.request_id, left.reason, left.kind))
            else:
                self._start(request, left)
        return failed

    def is_resident(self, adapter: str) -> bool:
        """Whether the version of an adapter that new requests get is in a slot."""
        store = self.store
        return (
            store is not None
            and adapter in store.names
            and (store.key(adapter) in store.slots.allocator)
        )

    def take(self, adapter: str) -> Take:
        """Take an adapter into use for a request, if that can be done now.

        Raises:
            AdapterLoadError: It could not be loaded.
            AdapterNotFoundError: There is no such adapter.
            ConfigError: The engine has no adapters.
        """
        if self.store is None:
            raise ConfigError("this engine serves the base model alone")
        key = self.store.key(adapter)
        if self.store.acquire(key) is not None:
            return Take.TAKEN
        return Take.LOADING if self.store.is_loading(key) else Take.NO_SLOT

    def _start(self, request: Submit, admitted: Admitted) -> None:
        key = None
        if admitted.adapter is not None and self.store is not None:
            key = self.store.key(admitted.adapter)
        self._running[request.request_id] = key
        first = self._first[request.request_id] = self._begins(request, key)
        self._sampler.add(request.request_id, request.sampling, request.prompt)
        if request.sampling.prompt_logprobs:
            count = request.sampling.logprobs or 0
            self._scores.add(request.request_id, request.prompt, count)
        elif self._context.shares_blocks:
            # Who asks about every token of a prompt needs every one computed.
            self._names[request.request_id] = names_of(key, request.cache_salt, first)
            self._unanswered[request.request_id] = len(request.prompt)
        self._engine.add_request(
            request.request_id,
            list(request.prompt),
            # Tokens are chosen by the controller's sampler; Megatron only counts them.
            SamplingParams(num_tokens_to_generate=request.sampling.max_tokens, termination_id=-1),
        )

    def _begins(self, request: Submit, key: AdapterKey | None) -> int:
        """The position from which a request uses its version; beyond all of them for never."""
        invocation = (
            None if key is None or self.store is None else self.store.invocation_tokens(key)
        )
        if invocation is None:
            return 0
        first = active_from(request.prompt, invocation)
        return self.options.max_model_len if first is None else first

    def _hashes_of(self, request_id: int, tokens: list[int]) -> list[int]:
        names = self._names.get(request_id)
        return [] if names is None else block_hashes(tokens, self.options.block_size, names)

    def _cached(self, request_id: int) -> int:
        """With a request's first token, how many of its prompt's tokens were in the cache."""
        length = self._unanswered.pop(request_id, None)
        if length is None:
            return 0
        found = self._context.reused[request_id]
        self._prefix_queries += length
        self._prefix_hits += found
        return found

    def _slot_of(self, request_id: int) -> int:
        key = self._running[request_id]
        return -1 if key is None or self.store is None else self.store.slots.allocator.slot(key)

    def _slots_in_use(self) -> set[int]:
        return {self._slot_of(request_id) for request_id in self._running} - {-1}

    def _finish(self, request_id: int, token: int) -> FinishReason | None:
        if request_id not in self._engine.finished:
            return None
        return "stop" if token in self._sampler.of(request_id).stop_ids else "length"

    def _end(self, request_id: int) -> None:
        key = self._running.pop(request_id)
        self._sampler.remove(request_id)
        self._scores.remove(request_id)
        for kept in (self._first, self._names, self._unanswered, self._context.reused):
            kept.pop(request_id, None)
        self.admission.finished(None if key is None else key.name)
        if key is not None and self.store is not None:
            self.store.release(key)


def _counts(adapters: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(name for name in adapters if name is not None).items()))
