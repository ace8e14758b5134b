"""The engine gives each request what the request would get alone, whoever shares its steps.

The reference knows nothing of the engine: a plain model with one adapter loaded, run over the whole
sequence again for every token, in fp64.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout
from bdlora_megatron.convert import write_adapter
from bdlora_megatron.layers import load_adapter, remove_lora
from bdlora_megatron.runtime.collectives import Collective
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.serve.engine.adapter_manager import AdapterManager
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import (
    AdapterResult,
    Choice,
    Failed,
    LoadAdapter,
    Sampling,
    Submit,
    Token,
    UnloadAdapter,
)
from tests.harness import run_ranks
from tests.tp.engine_cases import ADAPTERS, engine_for, make, requests, run, wide_model
from tests.tp.models import MODEL_CLASSES
from tests.tp.serving_cases import make_adapter
from tests.unit.serve.test_penalties import by_hand as by_formula

pytestmark = pytest.mark.engine


@torch.inference_mode()
def alone(model: Any, request: Submit) -> tuple[list[Choice], str]:
    """What the request gets from a plain model that runs nothing else."""
    sampler, wanted = Sampler(), request.sampling
    # What is done to logits is done by hand; the sampler is to choose from what it is given.
    plain = {"logit_bias": (), "min_tokens": 0, "repetition_penalty": 1.0}
    plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    sampler.add(0, replace(wanted, **plain, logprobs=None, prompt_logprobs=False))
    tokens, choices, prompt = list(request.prompt), [], []
    while True:
        ids = torch.tensor([tokens])
        logits = model(ids, torch.arange(len(tokens))[None], causal(len(tokens)))
        logits = gather_from_tensor_model_parallel_region(logits)[0]
        if request.sampling.prompt_logprobs and not choices:
            prompt = [
                by_hand(row, token, request.sampling.logprobs)
                for row, token in zip(logits, tokens[1:], strict=False)
            ]
        said = tokens[len(request.prompt) :]
        changed = by_formula(logits[-1].tolist(), wanted, list(request.prompt), said)
        choice = sampler.choose(logits.new_tensor([changed]), [0])[0]
        if wanted.logprobs is not None:
            choice = by_hand(logits[-1], choice.token, wanted.logprobs)
        choices.append(choice)
        tokens.append(choice.token)
        if choice.token in request.sampling.stop_ids:
            return prompt + choices, "stop"
        if len(choices) == request.sampling.max_tokens:
            return prompt + choices, "length"


def by_hand(logits: torch.Tensor, token: int, count: int) -> Choice:
    logprobs = [float(x) for x in logits - logits.exp().sum().log()]
    order = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])[:count]
    return Choice(token, logprobs[token], tuple((i, logprobs[i]) for i in order))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length).triu(1).bool()[None, None]


def all_alone(world: int, made: list[Submit]) -> dict[int, tuple[list[Choice], str]]:
    model, expected = wide_model(world), {}
    for name in (None, *ADAPTERS):
        if name is not None:
            load_adapter(model, make(name))
        for request in made:
            if request.adapter == name:
                expected[request.request_id] = alone(model.eval(), request)
        remove_lora(model)
    return expected


def check_equal(got: list[Choice], expected: list[Choice], *, whole: bool, label: str = "") -> None:
    wanted = [choice.token for choice in expected][: None if whole else len(got)]
    assert [choice.token for choice in got] == wanted, label
    for mine, theirs in zip(got, expected, strict=whole):
        assert (mine.logprob is None) == (theirs.logprob is None)
        if mine.logprob is not None:
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
            assert [x for _, x in mine.top] == pytest.approx([x for _, x in theirs.top], abs=1e-5)


def mixed_body(rank: int, world: int, model_class: str) -> dict[str, Any]:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        made = requests(40, seed=1)
        rng = random.Random(2)
        arrivals: dict[int, list[Submit]] = {}
        for request in made:
            arrivals.setdefault(rng.randint(0, 60), []).append(request)
        cancelled = {3, 8, 13, 21, 30}
        cancels: dict[int, list[int]] = {}
        for request_id in sorted(cancelled):
            when = next(s for s, rs in arrivals.items() if made[request_id] in rs)
            cancels.setdefault(when + rng.randint(1, 12), []).append(request_id)
        # First: since 0.18 an engine turns the whole process to inference.
        expected = all_alone(world, made)
        engine = engine_for(world, blocks=15, model_class=model_class)
        got, ends = run(engine, arrivals, cancels)
        after = engine.snapshot()
        for request in made:
            request_id = request.request_id
            choices, end = expected[request_id]
            whole = request_id in ends
            assert whole or request_id in cancelled
            check_equal(got[request_id], choices, whole=whole)
            assert not whole or ends[request_id] == end
        assert (after.running, after.queued, after.used_blocks, after.slots_in_use) == (0, 0, 0, 0)
        assert after.preemptions > 0, "the cache was never short: the test shows less than it says"
        assert after.slot_evictions > 0
        assert "stop" in ends.values()
        asked = [request for request in made if request.sampling.prompt_logprobs]
        assert max(len(request.prompt) for request in asked) > 10, "no chunks of such a prompt"
        cut = [request_id for request_id in cancelled if request_id not in ends]
        return {"got": got, "ends": ends, "after": after, "cut": len(cut)}


@pytest.mark.parametrize(
    ("world", "model_class"),
    [(1, "gpt"), *((world, MODEL_CLASSES[-1]) for world in (1, 2, 4))],
)
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(world, model_class):
    """Chunks of prompts, preemption, more adapters than slots, several blocks, cancellations."""
    first, *others = run_ranks(world, mixed_body, model_class)
    assert first["cut"] >= 2, "too few cancellations met a request in flight"
    for other in others:
        # Also what ranks decided without asking each other: order, slots, evictions.
        assert other == first


def cancel_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        long = Sampling(temperature=0.0, max_tokens=12)
        # One prompt is being read in chunks, two run: each state in which a request can be dropped.
        made = [
            Submit(request_id=i, prompt=tuple(range(1, n + 1)), sampling=long, adapter=a)
            for i, (n, a) in enumerate([(3, None), (4, "two"), (20, "two"), (2, None)])
        ]
        expected = all_alone(world, made)
        engine = engine_for(world, blocks=8, max_num_batched_tokens=6)
        for victims in ([2], [0], [0, 1], [1, 2], [0, 1, 2], [3]):
            for after in range(1, 9):
                for request in made:
                    engine.submit(request)
                got: dict[int, list[Choice]] = {request.request_id: [] for request in made}
                for step in range(200):
                    if step == after:
                        before = engine.snapshot().used_blocks
                        for request_id in victims:
                            engine.cancel(request_id)
                        freed = before - engine.snapshot().used_blocks
                        assert freed >= 0
                    if not engine.has_work:
                        break
                    for event in engine.step(wait_s=0.05):
                        got[event.request_id].append(event.choice)
                assert engine.snapshot().used_blocks == 0
                assert engine.snapshot().slots_in_use == 0
                for request in made:
                    whole = request.request_id not in victims
                    check_equal(
                        got[request.request_id],
                        expected[request.request_id][0],
                        whole=whole,
                        label=f"request {request.request_id}, without {victims} after {after}",
                    )


def test_a_cancelled_request_frees_its_cache_and_disturbs_nobody():
    run_ranks(1, cancel_body)


def failing_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(world, blocks=20)
        sampling = Sampling(temperature=0.0, max_tokens=2)
        assert engine.store is not None

        disk = {"gone": True, "reads": 0}

        def broken() -> Any:
            disk["reads"] += 1
            if rank == world - 1 and disk["gone"]:
                raise OSError("the disk is gone")
            return make("two")

        engine.store.register("broken", broken)
        names = ["broken", None, "two", "nobody", "broken"]
        for request_id, name in enumerate(names):
            engine.submit(
                Submit(request_id=request_id, prompt=(1, 2), sampling=sampling, adapter=name)
            )
        events = []
        for _ in range(50):
            events += engine.step(wait_s=0.05)
        failed = {event.request_id: event.reason for event in events if isinstance(event, Failed)}
        assert set(failed) == {0, 3, 4}
        assert f"rank {world - 1}" in failed[0]
        assert "the disk is gone" in failed[0]
        assert failed[4] == failed[0]
        assert disk["reads"] == 1, "one load that fails answers all who waited for it"
        assert "'nobody'" in failed[3]
        done = [e.request_id for e in events if isinstance(e, Token) and e.finish]
        assert sorted(done) == [1, 2]
        assert not engine.has_work
        # Every later request is another try, and the first one after the mend gets an answer.
        outcomes = []
        for request_id, gone in ((10, True), (11, False), (12, False)):
            disk["gone"] = gone
            engine.submit(
                Submit(request_id=request_id, prompt=(1, 2), sampling=sampling, adapter="broken")
            )
            while engine.has_work:
                outcomes += engine.step(wait_s=0.05)
        assert isinstance(outcomes[0], Failed)
        assert [e.request_id for e in outcomes[1:] if e.finish == "length"] == [11, 12]
        assert disk["reads"] == 3


def test_an_adapter_that_fails_on_one_rank_fails_its_requests_alone():
    run_ranks(2, failing_body)


def small_host_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        model = wide_model(world)
        for on_host, num_slots in ((1, 1), (1, 2), (1.99, 2), (1, 3), (2, 4)):
            engine = engine_for(
                world,
                blocks=30,
                model=model,
                on_host=on_host,
                num_slots=num_slots,
                max_per_adapter=1,
            )
            # All are absent at first; later ones come while earlier ones load, wait and run.
            names = ["two", "four", "vanilla", "attention", "four", "two", "two", "attention"]
            arrivals: dict[int, list[Submit]] = {}
            for number, name in enumerate(names):
                request = Submit(
                    request_id=number,
                    prompt=(1, 2),
                    sampling=Sampling(temperature=0.0, max_tokens=3 + number),
                    adapter=name,
                )
                arrivals.setdefault(number // 3, []).append(request)
            # Two leave again: while their adapters are being loaded, or wait.
            _, ends = run(engine, arrivals, {1: [0], 3: [7]})
            assert set(ends) == set(range(1, len(names) - 1)), (on_host, num_slots)
            assert engine.store is not None
            engine.store.close()
            engine.store.slots.detach()


@pytest.mark.parametrize("world", [1, 2])
def test_host_memory_for_one_adapter_serves_requests_for_all(world):
    run_ranks(world, small_host_body)


def same_prompt_body(rank: int, world: int) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        # Several blocks of the cache that hold the same tokens for everyone.
        prompt = tuple(range(1, 18))
        greedy = Sampling(temperature=0.0, max_tokens=6, logprobs=2)
        names = [None, *ADAPTERS]
        made = [
            Submit(request_id=i, prompt=prompt, sampling=greedy, adapter=name)
            for i, name in enumerate(names)
        ]
        expected = all_alone(world, made)
        assert len({str(choices) for choices, _ in expected.values()}) == len(names)
        changed = make_adapter(77, name="two", **ADAPTERS["two"])
        model = wide_model(world)
        load_adapter(model, changed)
        reloaded = alone(model.eval(), made[names.index("two")])
        assert reloaded != expected[names.index("two")]
        engine = engine_for(world, blocks=60)
        assert engine.store is not None
        order = (1, 2, 1, 0, 2, 3, 4, 1)
        turns = [[replace(made[which], request_id=100 + i) for i, which in enumerate(order)]]
        turns += [[replace(made[which], request_id=200 + i)] for i, which in enumerate(order)]
        for turn in turns:
            got, _ = run(engine, {0: list(turn)}, {})
            for request in turn:
                wanted = expected[names.index(request.adapter)][0]
                check_equal(got[request.request_id], wanted, whole=True, label=str(request.adapter))
        # The same name, other weights: nothing that was cached for the old ones may serve.
        engine.store.register("two", lambda: changed)
        for number in (9000, 9001):
            request = replace(made[names.index("two")], request_id=number)
            got, _ = run(engine, {0: [request]}, {})
            check_equal(got[number], reloaded[0], whole=True)


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_prompt_gets_each_adapters_own_answer(world):
    """No block of the cache may pass from one adapter, or version, to another."""
    run_ranks(world, same_prompt_body)


def unload_body(rank: int, world: int, root: Path) -> None:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(world, blocks=40)
        assert engine.store is not None
        manager, folder = AdapterManager(engine, engine.store), root / f"rank{rank}"
        write_adapter(make("two"), folder, "peft")
        assert manager.load(
            LoadAdapter(ticket=1, name="leaving", path=str(folder), wait=False)
        ) == AdapterResult(1)
        twice = LoadAdapter(ticket=4, name="twice", path=str(folder))
        assert manager.load(twice) is None
        assert "try later" in manager.load(replace(twice, ticket=5)).error
        engine.store.advance(wait_s=30.0)
        assert manager.settle() == [AdapterResult(4)]
        assert manager.unload(UnloadAdapter(ticket=6, name="twice")) is None
        assert manager.settle() == [AdapterResult(6)]
        greedy = Sampling(temperature=0.0, max_tokens=6)
        for request_id in (1, 2):
            engine.submit(
                Submit(request_id=request_id, prompt=(1, 2), sampling=greedy, adapter="leaving")
            )
        events: list[Any] = []
        while not events:
            events += engine.step(wait_s=0.05)
        assert manager.unload(UnloadAdapter(ticket=2, name="leaving")) is None
        while engine.has_work:
            assert manager.settle() == [], "it was unloaded under a request that runs"
            assert manager.unload(UnloadAdapter(ticket=3, name="leaving")).error
            again = LoadAdapter(ticket=7, name="leaving", path=str(folder), wait=False)
            assert "try later" in manager.load(again).error
            events += engine.step(wait_s=0.05)
        assert manager.settle() == [AdapterResult(2)]
        assert sum(event.finish == "length" for event in events) == 2
        assert "leaving" not in engine.store.names
        assert engine.store.host_bytes_used == 0


def test_unloading_waits_for_the_last_request(tmp_path):
    run_ranks(2, unload_body, tmp_path)


def sends_body(rank: int, world: int) -> dict[str | None, list[Collective]]:
    enable_cpu_inference()
    with runtime.model_parallel(world):
        engine = engine_for(world, blocks=20, num_slots=3, layouts=tuple(Layout))
        assert engine.store is not None
        engine.store.register("shared", partial(make, "vanilla"), layout=Layout.SLORA)
        greedy = Sampling(temperature=0.0, max_tokens=4)
        sent: dict[str | None, list[Collective]] = {}
        # In the first round adapters are loaded, which ranks agree on.
        for turn in range(2):
            for number, name in enumerate(("shared", "two", "vanilla", None)):
                request = Submit(
                    request_id=10 * turn + number, prompt=(1, 2, 3), sampling=greedy, adapter=name
                )
                with runtime.record_collectives() as log:
                    run(engine, {0: [request]}, {})
                sent[name] = log.calls
        assert len(engine.places().slot) == 3
        return sent


def test_only_steps_that_run_an_slora_adapter_communicate_for_it():
    """It is in a slot all the while."""
    for sent in run_ranks(2, sends_body):
        assert sent[None], "the comparison would be empty if the base model communicated nothing"
        assert sent["two"] == sent["vanilla"] == sent[None]
        # Two layers of four linears, four steps.
        assert len(sent["shared"]) == len(sent[None]) + 2 * 4 * 4
