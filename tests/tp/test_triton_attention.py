"""The engine over Triton's attention kernels, where no flash-attention is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from megatron.core.transformer import attention

from bdlora_megatron import runtime
from bdlora_megatron.runtime.attention import Attention, use_attention
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from tests.harness import run_ranks
from tests.tp import engine_cases
from tests.tp.serving_cases import serving_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs triton's interpreter"
    ),
]
if importlib.util.find_spec("triton") is not None:
    from bdlora_megatron.ops import paged_attention


def _run(world):
    """Greedy requests of all adapters and lengths: chunks of prompts, decoding, both in a step."""
    requests = [
        engine_cases.Submit(
            request_id=number,
            prompt=tuple((7 * number + place) % 50 for place in range(1 + 3 * number)),
            sampling=engine_cases.Sampling(
                temperature=0.0, max_tokens=3 + number % 3, logprobs=1, prompt_logprobs=number == 2
            ),
            adapter=[None, *engine_cases.ADAPTERS][number % 5],
        )
        for number in range(7)
    ]
    engine = engine_cases.engine_for(world, blocks=14, model=serving_model(world))
    with torch.inference_mode():
        return engine_cases.run(engine, {0: requests[:4], 2: requests[4:]}, {})


def _serve(rank, world):
    # What Megatron-Core itself calls; the CPU's stand-in takes the whole method's place.
    megatrons = attention.Attention.flash_decode_and_prefill
    enable_cpu_inference()
    with runtime.model_parallel(world):
        wanted, ends = _run(world)
        attention.Attention.flash_decode_and_prefill = megatrons
        calls = []

        def counted(function):
            def call(*args, **kwargs):
                calls.append(function.__name__)
                return function(*args, **kwargs)

            return call

        use_attention(Attention(kernels="triton"), torch.float32)
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
            assert getattr(attention, name) is getattr(paged_attention, name)
            setattr(attention, name, counted(getattr(attention, name)))
        found, same_ends = _run(world)
    assert same_ends == ends
    for request, choices in wanted.items():
        assert [c.token for c in found[request]] == [c.token for c in choices], request
        for choice, other in zip(choices, found[request], strict=True):
            assert other.logprob == pytest.approx(choice.logprob, abs=2e-5)
    return set(calls)


@pytest.mark.parametrize("world", [1, 2])
def test_answers_are_those_of_the_attention_for_cpus(world):
    for called in run_ranks(world, _serve):
        # Steps with prompts in them, and steps that only decode.
        assert called == {"flash_attn_varlen_func", "flash_attn_with_kvcache"}
