"""Requests for the serving engine and an engine that serves them, for tests of either."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bdlora_megatron.config import Layout
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine import EngineOptions, ServingEngine
from bdlora_megatron.serve.messages import Choice, Sampling, Submit, Token
from tests.tp.models import MODEL_CLASSES, VOCAB
from tests.tp.serving_cases import make_adapter, serving_model

ADAPTERS = {
    "vanilla": {"rank": 4},
    "two": {"rank": 4, "num_blocks": 2},
    "four": {"rank": 8, "num_blocks": 4},
    "attention": {"rank": 3, "modules": ("q_proj", "o_proj")},
}
BLOCK, LENGTH = 4, 32


def make(name: str) -> Any:
    return make_adapter(list(ADAPTERS).index(name), name=name, **ADAPTERS[name])


#: What every fourth request, and every fourth after it, asks to be done to its logits.
CHANGES = {
    1: {"presence_penalty": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    3: {"logit_bias": ((5, 4.0), (9, -100.0)), "min_tokens": 1, "frequency_penalty": -0.2},
}


def requests(count: int, seed: int) -> list[Submit]:
    rng = random.Random(seed)
    made = []
    for request_id in range(count):
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))
        sampled = rng.random() < 0.5
        sampling = Sampling(
            temperature=rng.uniform(0.5, 1.5) if sampled else 0.0,
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 7]),
            seed=rng.randrange(2**32),
            logprobs=(logprobs := rng.choice([None, 2])),
            prompt_logprobs=logprobs is not None and request_id % 3 > 0,
            max_tokens=rng.randint(1, 12),
            stop_ids=frozenset(rng.sample(range(VOCAB), 3)),
            **CHANGES.get(request_id % 4, {}),
        )
        adapter = rng.choice([None, *ADAPTERS])
        made.append(
            Submit(request_id=request_id, prompt=prompt, sampling=sampling, adapter=adapter)
        )
    return made


def engine_for(
    world: int,
    *,
    blocks: int,
    num_slots: int = 2,
    on_host: float = 3,
    model: Any = None,
    implementation: Any = None,
    layouts: tuple[Layout, ...] = (Layout.BDLORA, Layout.HALF_SHARDED),
    model_class: str = MODEL_CLASSES[-1],
    **options: Any,
) -> ServingEngine:
    model = wide_model(world, model_class) if model is None else model
    capacity = SlotCapacity(
        max_loras=num_slots, max_lora_rank=8, implementation=implementation, layouts=layouts
    )
    slots = ModelSlots(model, capacity)
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=int(on_host * slots.largest_bytes)))
    for name in ADAPTERS:
        store.register(name, partial(make, name))
    # Per position: keys and values, 2 layers, 24 / P numbers of 8 bytes; one block is Megatron's.
    kv_cache_memory_bytes = (blocks + 1) * BLOCK * 2 * 2 * (24 // world) * 8
    sizes = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 10,
        "max_model_len": LENGTH,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "patience_steps": 4,
    }
    return ServingEngine(model, store, EngineOptions(**{**sizes, **options}))


def wide_model(world: int, model_class: str = "gpt") -> Any:
    """In fp64, so that two ways to the same logits choose the same tokens."""
    wide = {"params_dtype": torch.float64, "pipeline_dtype": torch.float64}
    return serving_model(world, **wide, model_class=model_class).double()


def run(
    engine: ServingEngine,
    arrivals: dict[int, list[Submit]],
    cancels: dict[int, list[int]],
    after_step: Callable[[list[Any]], None] = lambda events: None,
):
    """Drive the engine; returns each request's tokens and finish reason.

    Where a prompt's log-probabilities are asked for, its tokens from the second on come first.
    """
    got: dict[int, list[Choice]] = {}
    ends: dict[int, Any] = {}
    for step in range(2000):
        for request in arrivals.pop(step, ()):
            engine.submit(request)
            got[request.request_id] = []
        for request_id in cancels.pop(step, ()):
            engine.cancel(request_id)
        if not (arrivals or cancels or engine.has_work):
            return got, ends
        events = engine.step(wait_s=0.05)
        after_step(events)
        for event in events:
            assert isinstance(event, Token), event
            assert event.request_id not in ends
            assert not (event.prompt and got[event.request_id])
            got[event.request_id] += [*event.prompt, event.choice]
            if event.finish is not None:
                ends[event.request_id] = event.finish
    raise AssertionError("the engine did not come to an end")
