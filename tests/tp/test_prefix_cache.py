"""Requests of one adapter that begin alike share blocks of the cache, and nobody else does.

Answers are compared with a plain model's that knows no cache at all, in fp64 (``all_alone``).
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

from bdlora_megatron import runtime
from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.layers import load_adapter
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.versions.known import prefix_caching
from bdlora_megatron.serve.engine.prefix import Names, block_hashes, names_of, seed_of
from bdlora_megatron.serve.messages import Sampling, Submit
from bdlora_megatron.serve.store_types import AdapterKey
from tests.harness import run_ranks
from tests.tp.engine_cases import ADAPTERS, BLOCK, engine_for, requests, run, wide_model
from tests.tp.models import MODEL_CLASSES, VOCAB
from tests.tp.serving_cases import make_adapter
from tests.tp.test_engine import all_alone, alone, check_equal

try:
    HAS_CACHE = prefix_caching(None)
except UnsupportedError:
    HAS_CACHE = False
#: Since 0.19, what was found does not count among the tokens of a step.
FINDS_BEYOND_A_STEP = hasattr(DynamicInferenceEngine, "_can_schedule_chunked_prefill")

pytestmark = pytest.mark.engine
needs_cache = pytest.mark.skipif(
    not HAS_CACHE, reason="Megatron-Core has a prefix cache since 0.17"
)

NAMES = (None, *ADAPTERS)
GREEDY = Sampling(temperature=0.0, max_tokens=4, logprobs=2)


def ask(number: int, prompt: Any, adapter: str | None = None, **more: Any) -> Submit:
    sampling = replace(GREEDY, **{k: more.pop(k) for k in list(more) if k != "cache_salt"})
    return Submit(
        request_id=number, prompt=tuple(prompt), sampling=sampling, adapter=adapter, **more
    )


def alike(count: int, seed: int) -> list[Submit]:
    """Requests of all kinds, with one of two beginnings of their prompts."""
    rng = random.Random(seed)
    begins = [tuple(rng.randrange(VOCAB) for _ in range(length)) for length in (11, 16)]
    return [
        replace(request, prompt=(rng.choice(begins) + request.prompt)[: rng.randint(13, 20)])
        for request in requests(count, seed)
    ]


def check_blocks(engine: Any) -> None:
    """Every block is free, kept for others, or used as often as rows hold it."""
    context = engine._context
    blocks = context.kv_block_allocator
    rows = context.total_request_count + context.unfinished_is_set_aside
    held = Counter(context.request_to_kv_block_ids[:rows].flatten().tolist())
    held.pop(-1, None)
    counts, names = blocks.block_ref_counts.tolist(), blocks.block_hashes.tolist()
    free = blocks.block_bag[: int(blocks.total_avail)].tolist()
    kept = {b for b, name in enumerate(names) if name != -1 and not counts[b]}
    assert {b: n for b, n in enumerate(counts) if n} == dict(held)
    assert len(free) == len(set(free))
    for one, other in ((free, held), (free, kept), (held, kept)):
        assert not set(one) & set(other)
    assert len(free) + len(held) + len(kept) == context.num_blocks
    assert all(names[block] == name for name, block in blocks.kv_hash_to_block_id.items())
    assert (context.used_blocks, context.cached_blocks) == (len(held), len(kept))


def mixed_body(rank: int, world: int, model_class: str) -> Any:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        made = alike(56, seed=5)
        rng = random.Random(6)
        arrivals: dict[int, list[Submit]] = {}
        for request in made:
            arrivals.setdefault(rng.randint(0, 50), []).append(request)
        cancels: dict[int, list[int]] = {}
        for number in (4, 9, 17, 31):
            came = next(step for step, some in arrivals.items() if made[number] in some)
            cancels.setdefault(came + rng.randint(1, 12), []).append(number)
        expected = all_alone(world, made)
        engine = engine_for(world, blocks=16, model_class=model_class)
        cached: dict[int, int] = {}
        kept = []

        def watch(events: list[Any]) -> None:
            check_blocks(engine)
            kept.append(engine.snapshot().cached_blocks)
            for event in events:
                assert not (event.cached and event.request_id in cached), "it is told once"
                cached.setdefault(event.request_id, event.cached)

        got, ends = run(engine, arrivals, cancels, watch)
        for request in made:
            choices, end = expected[request.request_id]
            whole = request.request_id in ends
            check_equal(got[request.request_id], choices, whole=whole)
            assert not whole or ends[request.request_id] == end
        after = engine.snapshot()
        # Those who ask about their prompts have them computed.
        lookups = [r for r in made if r.request_id in cached and not r.sampling.prompt_logprobs]
        assert after.prefix_cache_queries == sum(len(r.prompt) for r in lookups)
        assert after.prefix_cache_hits == sum(cached.values()) >= 16
        assert not any(cached[r.request_id] for r in made if r.sampling.prompt_logprobs)
        assert after.preemptions > 0, "the cache was never short: the test shows less than it says"
        assert after.slot_evictions > 0
        assert any(now < before for before, now in pairwise(kept)), "none went"
        assert (after.used_blocks, after.running, after.queued) == (0, 0, 0)
        return got, ends, cached, after


@needs_cache
@pytest.mark.parametrize(
    ("world", "model_class"), [(1, "gpt"), (1, MODEL_CLASSES[-1]), (2, MODEL_CLASSES[-1])]
)
def test_answers_with_the_cache_are_those_without(world, model_class):
    """Chunks, preemption, cancellations, more adapters than slots; blocks add up at every step."""
    first, *others = run_ranks(world, mixed_body, model_class)
    for other in others:
        assert other == first


def counted(engine: Any, made: list[Submit], expected: dict[int, Any]) -> list[int]:
    """Run requests that come together; how many tokens of each one's prompt were found."""
    cached: dict[int, int] = {}
    context = engine._context
    names = context.kv_block_allocator.block_hashes
    before = names.tolist()

    def watch(events: list[Any]) -> None:
        check_blocks(engine)
        for event in events:
            if len(made) == 1 and not cached:
                # What it does not count as found it must not share: it would write there.
                (taken,) = context.request_to_kv_block_ids[: context.total_request_count].tolist()
                old = [b for b in taken if b >= 0 and -1 != before[b] == int(names[b])]
                assert BLOCK * len(old) == event.cached
            cached.setdefault(event.request_id, event.cached)

    got, _ = run(engine, {0: list(made)}, {}, watch)
    for request in made:
        check_equal(got[request.request_id], expected[request.request_id][0], whole=True)
    return [cached[request.request_id] for request in made]


def counts_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        whole = tuple(range(1, 21))
        # By length, some of them whole blocks; then longer ones, and one that leaves the path.
        turns = [[ask(10 * turn + n, whole[: 11 + n]) for n in range(4)] for turn in range(2)]
        fork = (*whole[:8], *reversed(whole[8:]))
        more = [ask(30, whole[:18]), ask(31, fork)]
        shared = [[ask(100 + 10 * turn + i, whole[:14], n) for i, n in enumerate(NAMES)]
                  for turn in range(2)]  # fmt: skip
        salted = [ask(200 + i, whole[:14], cache_salt=s) for i, s in enumerate("aab")]
        crowd = [ask(300 + i, whole[:6:-1], "two") for i in range(4)]
        pairs = [ask(350 + i, whole[:10], cache_salt=salt) for i, salt in enumerate("xxyyz")]
        scored = ask(400, whole[:14], prompt_logprobs=True)
        flat = [
            *turns[0],
            *turns[1],
            *more,
            *shared[0],
            *shared[1],
            *salted,
            *crowd,
            *pairs,
            scored,
        ]
        expected = all_alone(world, flat)
        engine = engine_for(world, blocks=60, max_num_batched_tokens=40)
        assert [counted(engine, [one], expected)[0] for one in turns[0]] == [0, 8, 8, 12]
        # At least two tokens are computed: of 12 and of 13, the last block is not taken over.
        assert [counted(engine, [one], expected)[0] for one in turns[1]] == [8, 8, 8, 12]
        assert [counted(engine, [one], expected)[0] for one in more] == [12, 8]
        assert counted(engine, shared[0], expected) == [12, 0, 0, 0, 0]
        assert counted(engine, shared[1], expected) == [12] * 5
        before = engine.snapshot()
        assert counted(engine, [scored], expected) == [0]
        assert engine.snapshot().prefix_cache_queries == before.prefix_cache_queries
        assert counted(engine, salted, expected) == [0, 12, 0]
        # They come in one step; the first computes what the others find in the next.
        assert counted(engine, crowd, expected) == [0, 8, 8, 8]
        # Who waits for the first of its kind keeps nobody else waiting.
        steps: list[list[int]] = []
        run(engine, {0: pairs}, {}, lambda events: steps.append(ids(events)))
        assert [step[:3] for step in steps[:2]] == [[350, 352, 354]] * 2
        assert steps[1][3:] == [351, 353]
        off = engine_for(world, blocks=60, enable_prefix_caching=False)
        assert [counted_off(off, one, expected) for one in (*turns[0], *turns[1])] == [0] * 8
        assert off.snapshot().cached_blocks == off.snapshot().prefix_cache_queries == 0


def ids(events: list[Any]) -> list[int]:
    return [event.request_id for event in events]


def counted_off(engine: Any, request: Submit, expected: dict[int, Any]) -> int:
    found = []
    got, _ = run(engine, {0: [request]}, {}, lambda events: found.extend(e.cached for e in events))
    check_equal(got[request.request_id], expected[request.request_id][0], whole=True)
    return sum(found)


@needs_cache
@pytest.mark.parametrize("world", [1, 2])
def test_what_is_found_is_counted_to_the_token(world):
    """Whole blocks, forks, adapters, salts, requests in one step, prompts that are scored."""
    run_ranks(world, counts_body)


def chunks_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        whole = tuple(range(1, 21))
        made = [ask(i, whole, "four") for i in range(3)] + [ask(3, (*whole[:16], 3, 3), "four")]
        turn = [ask(50 + i, whole[:10], n) for i, n in enumerate(("two", "four", "two"))]
        # The oldest blocks are those that the last one shares, and it needs two that are in use.
        tight = [ask(60, whole[:13]), ask(61, whole[12::-1]), ask(62, (*whole[:13], *whole[:15]))]
        expected = all_alone(world, made + turn + tight)
        engine = engine_for(world, blocks=60, max_num_batched_tokens=7)
        assert counted(engine, [made[0]], expected) == [0]
        found = [counted(engine, [one], expected)[0] for one in made[1:]]
        assert found == ([16] * 3 if FINDS_BEYOND_A_STEP else [4] * 3)
        # One slot: its adapter left it, and its blocks are good all the same when it is back.
        narrow = engine_for(world, blocks=60, num_slots=1)
        assert [counted(narrow, [one], expected)[0] for one in turn] == [0, 0, 8]
        assert narrow.snapshot().slot_evictions == 2
        full = engine_for(world, blocks=8, max_num_batched_tokens=40)
        assert [counted(full, [one], expected)[0] for one in tight] == [0, 0, 12]


@needs_cache
def test_chunks_and_slots_and_a_cache_that_is_full():
    run_ranks(1, chunks_body)


def reload_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        changed = make_adapter(77, name="two", **ADAPTERS["two"])
        # Too little room for all answers: some are computed again after the reload.
        old = [ask(i, (*range(1, 13), i), "two", max_tokens=14) for i in range(4)]
        new = [replace(request, request_id=10 + i) for i, request in enumerate(old)]
        expected = all_alone(world, old)
        model = wide_model(world)
        load_adapter(model, changed)
        expected |= {request.request_id: alone(model.eval(), request) for request in new}
        assert expected[0][0] != expected[10][0]
        engine = engine_for(world, blocks=18, max_num_batched_tokens=20, patience_steps=50)
        before: list[int] = []

        def watch(events: list[Any]) -> None:
            check_blocks(engine)
            if not before and engine.snapshot().running == len(old):
                before.append(engine.snapshot().preemptions)
                engine.store.register("two", lambda: changed)

        got, _ = run(engine, {0: list(old), 12: list(new)}, {}, watch)
        assert engine.snapshot().preemptions > before[0]
        for number, choices in got.items():
            check_equal(choices, expected[number][0], whole=True, label=str(number))
        # Nothing of a version is found by another of the same name.
        engine.store.unregister("two")
        engine.store.register("two", lambda: changed)
        again = replace(new[0], request_id=20)
        assert counted(engine, [again], {20: expected[10]}) == [0]


@needs_cache
@pytest.mark.parametrize("world", [1, 2])
def test_a_request_keeps_its_version_when_it_is_preempted_after_a_reload(world):
    run_ranks(world, reload_body)


def room_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        rng = random.Random(3)
        prompts = [tuple(rng.randrange(VOCAB) for _ in range(13)) for _ in range(24)]
        long = [ask(i, prompt, max_tokens=10 + i % 9) for i, prompt in enumerate(prompts)]
        kept, on = [], engine_for(world, blocks=30)

        def watch(events: list[Any]) -> None:
            if int(on._context.blocks.total_avail) == 0:
                kept.append(on.snapshot().cached_blocks)

        shared, _ = run(on, {0: list(long)}, {}, watch)
        off = engine_for(world, blocks=30, enable_prefix_caching=False)
        apart, _ = run(off, {0: list(long)}, {})
        assert shared == apart
        for name in ("steps", "preemptions", "used_blocks"):
            assert getattr(on.snapshot(), name) == getattr(off.snapshot(), name)
        assert max(kept) > 5, "the cache was never full of what nobody uses"


@needs_cache
def test_blocks_that_are_only_kept_make_room_like_free_ones():
    """Prompts without anything in common: each step runs what it runs without a cache."""
    run_ranks(1, room_body)


def sends_body(rank: int, world: int) -> list[Any]:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(world, blocks=30, max_num_batched_tokens=30)
        sent = []
        # The first loads the adapter, which ranks agree on.
        for number, begin in enumerate((1, 2, 2)):
            with runtime.record_collectives() as log:
                run(engine, {0: [ask(number, range(begin, begin + 14), "two")]}, {})
            sent.append(log)
        assert engine.snapshot().prefix_cache_hits == 12
        _, computed, found = sent
        assert found.payload_bytes < computed.payload_bytes
        return [[call.kind for call in log.calls] for log in (computed, found)]


@needs_cache
def test_what_is_found_sends_nothing():
    """A step that reads less of a prompt communicates as often."""
    for computed, found in run_ranks(2, sends_body):
        assert computed == found != []


@needs_cache
@pytest.mark.parametrize("length", [0, 3, 4, 11, 12])
def test_without_an_adapter_blocks_are_named_as_megatron_core_names_them(length):
    from megatron.core.inference.inference_request import compute_block_hashes_batched

    tokens = list(range(7, 7 + length))
    wanted = compute_block_hashes_batched(torch.tensor(tokens, dtype=torch.int64), BLOCK)
    assert block_hashes(tokens, BLOCK, names_of(None, None, 0)) == wanted
    assert len(wanted) == length // BLOCK


def test_no_two_who_ask_begin_alike():
    """Names that run into their versions or salts, and a salt that looks like a name."""
    keys = [AdapterKey("a", 11), AdapterKey("a1", 1), AdapterKey("a", 1), AdapterKey("null", 0)]
    salts = [None, "", "a", '"', "1"]
    seeds = [seed_of(key, salt) for key in (None, *keys) for salt in salts]
    assert len(set(seeds)) == len(seeds)
    assert {len(seed) for seed in seeds} == {32}
    # In the hash of the second block the first one's tokens and the seed count, too.
    tokens = list(range(2 * BLOCK))
    second = {block_hashes(tokens, BLOCK, Names(seed))[1] for seed in seeds}
    second |= {block_hashes([9, *tokens[1:]], BLOCK, Names(seed))[1] for seed in seeds}
    assert len(second) == 2 * len(seeds)


def without_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world), pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr(
            logging.Logger, "warning", lambda self, message, *a, **k: told.append(message)
        )
        made = [ask(number, range(1, 12), "two") for number in range(2)]
        expected = all_alone(world, made)
        engine = engine_for(world, blocks=30)
        assert [counted_off(engine, request, expected) for request in made] == [0, 0]
        assert sum("no prefix cache" in message for message in told) == (rank == 0)
        with pytest.raises(UnsupportedError, match=r"wants megatron-core 0\.17"):
            engine_for(world, blocks=30, enable_prefix_caching=True)


@pytest.mark.skipif(HAS_CACHE, reason="this release of Megatron-Core has a prefix cache")
def test_a_release_without_one_says_so():
    run_ranks(2, without_body)
