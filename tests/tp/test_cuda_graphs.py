"""Serving steps that are captured once and replayed, over a stand-in for CUDA graphs.

The stand-in replays the operations of a linear layer on the memory that they were recorded on, with
the Triton kernels in their interpreter. So slots, tables and batches must be changed in place, and
nothing may wait for the device.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.versions.layers import has_hybrid_model
from bdlora_megatron.serve import ModelSlots, SlotCapacity
from bdlora_megatron.serve.messages import Grammar, Sampling, Submit
from tests.fakes import cuda_graphs
from tests.harness import run_ranks
from tests.tp import engine_cases
from tests.tp.models import MODEL_CLASSES, VOCAB
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel
from tests.tp.test_grammars import END, VOCABULARY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton's interpreter"
)


def _requests():
    """Greedy, so that rounding does not decide; more adapters than slots."""
    adapters = [None, *engine_cases.ADAPTERS, "two"]
    return [
        Submit(
            request_id=number,
            prompt=tuple(range(number + 1, number + 2 + number % 3)),
            sampling=Sampling(temperature=0.0, max_tokens=2 + number % 3),
            adapter=adapter,
        )
        for number, adapter in enumerate(adapters)
    ] + [
        Submit(
            request_id=200 + 10 * who + number,
            prompt=prompt,
            sampling=Sampling(temperature=0.0, max_tokens=4),
            adapter=adapter,
        )
        for who, adapter in enumerate(("activated", None, "everywhere"))
        for number, prompt in enumerate([(1, 2, 3, 4), (4, 3, 2, 1)])
    ]


def _engine(*, graphs, model_class=MODEL_CLASSES[-1]):
    captured = {"cuda_graph_impl": "local"} if graphs else {}
    model = serving_model(1, **captured, model_class=model_class)
    kernels = "triton" if graphs else None
    engine = engine_cases.engine_for(
        1, blocks=30, model=model, implementation=kernels, cuda_graphs=graphs
    )
    strong = make_adapter(1, scale=20.0, **engine_cases.ADAPTERS["two"])
    activated = dataclasses.replace(strong, invocation_tokens=(2, 3))
    engine.store.register("everywhere", lambda: strong)
    engine.store.register("activated", lambda: activated)
    return engine


def _outcome(*, graphs, model_class):
    """What the engine gives, with the Triton kernels in captured steps or the CPU's without."""
    engine = _engine(graphs=graphs, model_class=model_class)
    made = _requests()
    # The last one finds its prompt in the cache, where there is one, and reads on behind it.
    alike = [
        dataclasses.replace(made[1], request_id=100 + i, prompt=tuple(range(1, 8)))
        for i in range(2)
    ]
    with torch.inference_mode():
        got, ends = engine_cases.run(engine, {0: made[:3], 3: [*made[3:], *alike]}, {})
    assert engine.snapshot().slot_evictions > 0
    # Before 0.19 only a prompt's first chunk is looked up, which is too short here.
    assert engine.snapshot().prefix_cache_hits == (4 if has_hybrid_model() else 0)
    said = {i: [choice.token for choice in choices] for i, choices in got.items()}
    # An Activated LoRA acts in its first prompt, from the second token on, and not in the other.
    assert said[200] not in (said[210], said[220])
    assert said[201] == said[211] != said[221]
    return said, ends


def _serve(rank, world, model_class):
    cuda_graphs.install()
    enable_cpu_inference()
    with runtime.model_parallel(world, cuda_graphs=True):
        wanted = _outcome(graphs=False, model_class=model_class)
        assert not cuda_graphs.COUNTS
        found = _outcome(graphs=True, model_class=model_class)
        assert found == wanted
        return dict(cuda_graphs.COUNTS)


@pytest.mark.engine
def test_replayed_steps_give_the_tokens_of_steps_that_are_not():
    (counts,) = run_ranks(1, _serve, MODEL_CLASSES[-1])
    # Of each size: four linear layers of two decoder layers, each with two launches. Until 0.18
    # there is one size, as asked for; 0.19 halves it until there is one request.
    sizes, rest = divmod(counts["recorded"], 8)
    assert (sizes >= 1, rest) == (True, 0)
    assert counts["launches"] == 16 * sizes
    # And as many steps as there are rounds beyond prompts.
    assert counts["replayed"] >= 4 * 8


#: A value for every request option, with what it needs beside it.
OPTIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "seed": {"temperature": 1.0, "seed": 11},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"logprobs": 2, "prompt_logprobs": True},
    "max_tokens": {"max_tokens": 1},
    "stop_ids": {"stop_ids": frozenset(range(0, VOCAB, 2))},
    "min_tokens": {"stop_ids": frozenset(range(0, VOCAB, 2)), "min_tokens": 3},
    "logit_bias": {"logit_bias": ((5, 4.0), (9, -100.0))},
    "presence_penalty": {"presence_penalty": 0.9},
    "frequency_penalty": {"frequency_penalty": 0.4},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "grammar": {
        "grammar": Grammar("start: /[a-f]{2}[0-9]/", VOCABULARY.key),
        "stop_ids": frozenset({END}),
    },
}


def _optional_requests():
    """One for each option, of every adapter in turn, half of them later than the others."""
    adapters = [None, *engine_cases.ADAPTERS]
    made = []
    for number, option in enumerate(OPTIONS.values()):
        made.append(
            Submit(
                request_id=number,
                # Some are longer than a step, and read in chunks beside others.
                prompt=tuple((5 * number + place) % VOCAB for place in range(2 + number % 11)),
                sampling=Sampling(**{"temperature": 0.0, "max_tokens": 4, **option}),
                adapter=adapters[number % len(adapters)],
            )
        )
    return {0: made[::2], 4: made[1::2]}


def _options(rank, world):
    cuda_graphs.install()
    enable_cpu_inference()
    with runtime.model_parallel(world, cuda_graphs=True), torch.inference_mode():
        plain, captured = (_engine(graphs=graphs) for graphs in (False, True))
        for engine in (plain, captured):
            engine.learn(VOCABULARY)
        wanted, wanted_ends = engine_cases.run(plain, _optional_requests(), {})
        found, ends = engine_cases.run(captured, _optional_requests(), {})
        assert ends == wanted_ends
        assert ends[list(OPTIONS).index("grammar")] == "stop"
        for request, choices in found.items():
            assert [c.token for c in choices] == [c.token for c in wanted[request]], request
            for choice, other in zip(choices, wanted[request], strict=True):
                _same_logprobs(choice, other)
        return cuda_graphs.COUNTS["replayed"]


def _same_logprobs(choice, other):
    assert (choice.logprob is None) == (other.logprob is None)
    if choice.logprob is not None:
        assert choice.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in choice.top] == [token for token, _ in other.top]


@pytest.mark.engine
def test_every_request_option_goes_with_captured_steps():
    """A prompt's log-probabilities once ended all ranks, from Megatron-Core 0.18 on."""
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(Sampling)}
    (replayed,) = run_ranks(1, _options, timeout_s=200)
    # Of eight layers each, in a run of some twenty steps.
    assert replayed >= 8 * 4


def _slots(rank, world):
    with model_parallel(world):
        layouts = (Layout.BDLORA, Layout.SLORA)
        for held, exchange in ((layouts[:1], False), (layouts, True)):
            slots = ModelSlots(serving_model(world), SlotCapacity(max_loras=3, layouts=held))
            places = set()
            for token_slot in ([0, -1, 2, -1], [1, 1, -1, -1], [-1] * 4):
                slots.set_captured_batch(torch.tensor(token_slot))
                assert slots.step.batch.token_slot.tolist() == token_slot
                # Though no adapter in that layout is there yet: a graph cannot begin to ask.
                assert slots.step.exchange is exchange
                places.add(slots.step.batch.token_slot.data_ptr())
            slots.set_captured_batch(torch.tensor([0, 1]))
            assert slots.step.batch.num_tokens == 2
            slots.set_captured_batch(torch.tensor([0, 0, 0, 0]))
            places.add(slots.step.batch.token_slot.data_ptr())
            assert len(places) == 1
            slots.set_batch(slots.batch(torch.tensor([0, 1, 2, -1])))
            assert slots.step.exchange is False
            assert slots.step.batch.token_slot.data_ptr() not in places


def test_steps_of_a_size_are_described_in_one_place():
    run_ranks(1, _slots)
