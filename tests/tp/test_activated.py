"""An Activated LoRA acts in the engine from where on it acts in PEFT's ``generate``.

Its keys and values before that are the base model's, in the cache too.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from bdlora_megatron import runtime
from bdlora_megatron.convert import read_peft
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.serve.engine.prefix import block_hashes, names_of
from bdlora_megatron.serve.messages import Submit
from bdlora_megatron.serve.store_types import AdapterKey
from tests.golden.peft_cases import VOCAB
from tests.harness import run_ranks
from tests.tp.activated_cases import BLOCK, NAMES, Peft, ask, engine_for, make_folder
from tests.tp.engine_cases import run
from tests.tp.test_engine import check_equal
from tests.tp.test_prefix_cache import counted, needs_cache

pytestmark = pytest.mark.engine

#: Where "first" begins: the last [7, 8].
PROMPTS = {
    "middle": (1, 2, 3, 7, 8, 4, 5),
    "several": (7, 8, 3, 7, 8, 4, 7, 1),
    "at the start": (7, 8, 3, 4, 5, 6),
    "at the end": (5, 6, 4, 3, 7, 8),
    "all of it": (7, 8),
    "absent": (1, 2, 3, 4, 5, 6, 8, 7),
    "longer than the prompt": (7,),
    # Both other adapters' tokens, and more than one chunk before and behind.
    "late": (*range(20, 32), 9, 3, 7, 8, 1, 2, 3, 9),
    "over a chunk's end": (*range(40, 49), 7, 8, 1, 2, 3),
    # A multi-turn chat: an earlier answer of the adapter's stands in the prompt.
    "second turn": (1, 7, 8, 50, 51, 52, 1, 7, 8),
}
#: Chosen whatever the logits are: 8 behind a prompt that ends in 7, and on and on.
GENERATED = {"prompt_logprobs": False, "logit_bias": ((8, 100.0),)}


def made() -> list[Submit]:
    """Each prompt for each adapter; twice for n=2; some score their prompts."""
    requests = []
    for prompt in PROMPTS.values():
        for name in NAMES:
            number = len(requests)
            more: dict[str, Any] = {
                "max_tokens": 3 + number % 9,
                "prompt_logprobs": number % 3 == 0,
            }
            requests.append(ask(number, prompt, name, **more))
    for name in NAMES:
        for prompt in (PROMPTS["absent"], PROMPTS["longer than the prompt"]):
            more = {**GENERATED, "max_tokens": 14}
            requests.append(ask(len(requests), prompt, name, **more))
    return requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = make_folder(tmp_path_factory.mktemp("activated"))
    peft = Peft(root)
    expected = {request.request_id: peft.answer(request) for request in made()}
    torch.save(expected, root / "expected.pt")
    cached = {r.request_id: (peft.answer(r), "length") for r in cache_requests()}
    torch.save(cached, root / "cached.pt")
    return root


def loaded(root, name) -> dict[int, Any]:
    return torch.load(root / name, weights_only=False)


def mixed_body(rank: int, world: int, root: Any) -> Any:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        expected, requests = loaded(root, "expected.pt"), made()
        # Nothing would be shown if an adapter changed nothing, or if it acted on every token.
        told = {str(expected[request.request_id]) for request in requests}
        assert len(told) > len(requests) // 2
        rng = random.Random(4)
        arrivals: dict[int, list[Submit]] = {}
        for request in requests:
            arrivals.setdefault(rng.randint(0, 60), []).append(request)
        engine = engine_for(root, world, blocks=18, num_slots=3)
        got, ends = run(engine, arrivals, {})
        assert len(ends) == len(requests)
        for request in requests:
            label = f"{request.adapter} of {request.prompt}"
            check_equal(
                got[request.request_id], expected[request.request_id], whole=True, label=label
            )
        after = engine.snapshot()
        assert after.preemptions > 0, "the cache was never short: the test shows less than it says"
        assert after.slot_evictions > 0
        return got, after


@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_gives_what_peft_generates(world, folder):
    """Chunks, preemption, more adapters than slots, other adapters and the base in one batch."""
    first, *others = run_ranks(world, mixed_body, folder)
    for other in others:
        assert other == first


#: A prompt without any invocation, and 14 of its tokens with each one's behind them.
WHOLE = tuple(range(20, 36))
LEAD = WHOLE[:14]
#: The same first block, in which "first" begins at 1, and at 3 over the block's end.
EARLY, LATE = (1, 7, 8, 7, 5, 2, 3, 4, 5, 6), (1, 7, 8, 7, 8, 2, 3, 4, 5, 6)


def cache_requests() -> list[Submit]:
    prompts = [
        ("base", None, WHOLE, None),
        ("first", "first", (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), None),
        ("first again", "first", (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), None),
        ("other", "other", (*LEAD, 9, 8, 1, 2, 3, 4, 5, 6), None),
        ("blocked", "blocked", (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), None),
        ("base of it", None, (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), None),
        ("plain", "plain", (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), None),
        ("not invoked", "first", WHOLE, None),
        ("salted", "first", (*LEAD, 7, 8, 1, 2, 3, 4, 5, 6), "a"),
        ("salted base", None, WHOLE, "a"),
        ("leads", "other", (*range(60, 72), 9, 1, 2), None),
        ("base behind", None, (*range(60, 72), 9, 1, 2), None),
        ("early", "first", EARLY, None),
        ("late", "first", LATE, None),
        ("late again", "first", LATE, None),
        ("at once", "first", (7, 8, *WHOLE), None),
        ("at once again", "first", (7, 8, *WHOLE), None),
        ("plain at once", "plain", (7, 8, *WHOLE), None),
    ]
    return [ask(i, prompt, name, salt=salt) for i, (_, name, prompt, salt) in enumerate(prompts)]


#: Tokens of each one's prompt that are found, of what those before it have left.
FOUND = [0, 12, 20, 12, 12, 12, 0, 12, 0, 12, 0, 12, 0, 0, 8, 0, 16, 0]


def cache_body(rank: int, world: int, root: Any) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        expected, requests = loaded(root, "cached.pt"), cache_requests()
        engine = engine_for(root, world, blocks=120, max_num_batched_tokens=40)
        found = [counted(engine, [request], expected)[0] for request in requests]
        assert found == FOUND
        # A new version finds the base model's blocks, and none behind its beginning.
        engine.store.register("first", lambda: read_peft(root / "first"))
        again = replace(requests[1], request_id=100)
        assert counted(engine, [again], {100: expected[1]}) == [12]
        # In one step: those behind the first wait for the base model's blocks that it computes.
        crowd = [ask(200 + i, (*range(80, 92), 7, 8, 9), name) for i, name in enumerate(NAMES)]
        cached: dict[int, int] = {}
        run(engine, {0: crowd}, {}, lambda events: [cached.setdefault(e.request_id, e.cached)
                                                    for e in events])  # fmt: skip
        assert [cached[request.request_id] for request in crowd] == [0, 12, 12, 0, 12]


@needs_cache
@pytest.mark.parametrize("world", [1, 2])
def test_blocks_before_the_beginning_are_the_base_models(world, folder):
    """Whoever computes them; and none at or behind it passes from one to another."""
    run_ranks(world, cache_body, folder)


def test_a_blocks_name_tells_where_its_adapter_begins():
    key, tokens = AdapterKey("a", 1), list(range(5 * BLOCK))
    base = block_hashes(tokens, BLOCK, names_of(None, "s", 0))
    seen: list[int] = []
    for first in range(1, 5 * BLOCK):
        names = block_hashes(tokens, BLOCK, names_of(key, "s", first))
        shared = first // BLOCK
        assert names[:shared] == base[:shared]
        seen += names[shared:]
    for other in (AdapterKey("a", 2), AdapterKey("b", 1)):
        seen += block_hashes(tokens, BLOCK, names_of(other, "s", 6))[1:]
    for salt in (None, "t"):
        seen += block_hashes(tokens, BLOCK, names_of(key, salt, 6))
    seen += block_hashes(tokens, BLOCK, names_of(key, "s", 0))
    assert len(set(seen) - set(base)) == len(seen)
    assert block_hashes(tokens, BLOCK, names_of(key, "s", 10**6)) == base


def vocabulary_body(rank: int, world: int, root: Any) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(root, world, blocks=20)
        slots, adapter = engine.store.slots, read_peft(root / "first")
        slots.check(replace(adapter, invocation_tokens=(VOCAB - 1,)))
        # The last rank's rows are padded, and a padded row is no token.
        with pytest.raises(ConfigError, match=f"the model's ids end at {VOCAB - 1}"):
            slots.check(replace(adapter, invocation_tokens=(3, VOCAB)))
        ones = [replace(adapter, invocation_tokens=tokens) for tokens in ((7, 8), (7, 9), None)]
        digests = {slots.shard(one).digest for one in ones}
        assert len(digests) == 3, "ranks would not notice that they read different files"


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    run_ranks(2, vocabulary_body, folder)
