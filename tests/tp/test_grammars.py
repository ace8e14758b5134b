"""Grammars in the engine: each rank masks for itself, and requests take their grammar along."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from bdlora_megatron import runtime
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.serve.messages import Failed, Grammar, Sampling, Submit, Token, Vocabulary
from tests.harness import run_ranks
from tests.tp.engine_cases import engine_for, requests, run

pytestmark = pytest.mark.engine

#: Of the model's 56 tokens the last ones have no letter: its vocabulary is padded.
LETTERS = "~0123456789abcdefghijklmnopqrstuvwxyz<>"
END = 0
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(LETTERS)}, "merges": []},
    "added_tokens": [],
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
}
VOCABULARY = Vocabulary("letters", json.dumps(TOKENIZER), frozenset({END}))


def held(request: Submit, regex: str) -> Submit:
    grammar = Grammar(f"start: /{regex}/", VOCABULARY.key)
    sampling = replace(
        request.sampling, grammar=grammar, max_tokens=12, stop_ids=frozenset({END}),
        min_tokens=0, logit_bias=(), logprobs=None, prompt_logprobs=False,
    )  # fmt: skip
    adapter = (None, "two", "vanilla")[request.request_id % 3]
    return replace(request, sampling=sampling, adapter=adapter)


def mixed_body(rank: int, world: int) -> Any:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        made = requests(12, seed=5)
        regexes = {i: ("[a-f]{7,9}<[0-9]", "[0-9]{3}(x|yz)*")[i % 4 // 2] for i in range(0, 12, 2)}
        mixed = [held(r, regexes[i]) if i in regexes else r for i, r in enumerate(made)]
        free = [request for i, request in enumerate(made) if i not in regexes]
        unheld, _ = run(engine_for(world, blocks=15), {0: free}, {})
        roomy = engine_for(world, blocks=60)
        roomy.learn(VOCABULARY)
        unhurried = run(roomy, {0: mixed}, {})
        engine = engine_for(world, blocks=9)
        engine.learn(VOCABULARY)
        got, ends = run(engine, {0: mixed}, {})
        assert (got, ends) == unhurried
        after = engine.snapshot()
        assert after.preemptions > 0, "nothing was computed again"
        assert after.used_blocks == 0
        for request in free:
            assert got[request.request_id] == unheld[request.request_id]
        for i, regex in regexes.items():
            tokens = [choice.token for choice in got[i]]
            text = "".join(LETTERS[token] for token in tokens if token != END)
            assert (ends[i] == "stop") == (tokens[-1] == END)
            assert ends[i] == "length" or re.fullmatch(regex, text), text
            assert re.match("[a-f]{7}" if regex.startswith("[a-f]") else "[0-9]{3}", text), text
        assert {ends[i] for i in regexes} >= {"stop"}
        return {"got": {i: [c.token for c in got[i]] for i in regexes}, "ends": ends}


@pytest.mark.parametrize("world", [1, 2])
def test_a_mixed_batch_follows_its_grammars_and_leaves_the_others_alone(world):
    first, *others = run_ranks(world, mixed_body)
    for other in others:
        assert other == first


def fault_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(world, blocks=15)
        engine.learn(VOCABULARY)
        bad = Grammar("start: nowhere", VOCABULARY.key)
        for request_id, grammar, most in ((1, bad, 5), (2, None, 5), (3, bad, 1)):
            sampling = Sampling(temperature=0.0, max_tokens=most, grammar=grammar)
            engine.submit(Submit(request_id=request_id, prompt=(3, 4, 5), sampling=sampling))
        events = [event for _ in range(10) for event in engine.step()]
        failed = [event for event in events if isinstance(event, Failed)]
        assert sorted((event.request_id, event.kind) for event in failed) == [
            (1, "ConfigError"), (3, "ConfigError"),
        ]  # fmt: skip
        assert all("nowhere" in event.reason for event in failed)
        told = [event for event in events if isinstance(event, Token)]
        assert [event.request_id for event in told] == [2] * 5
        after = engine.snapshot()
        assert (after.running, after.queued, after.used_blocks) == (0, 0, 0)


def test_a_request_whose_grammar_fails_ends_alone():
    run_ranks(1, fault_body)
