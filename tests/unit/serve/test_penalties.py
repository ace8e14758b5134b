"""Penalties, biases and least lengths against OpenAI's and vLLM's formulae, token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch

from bdlora_megatron.serve.engine.penalties import Penalties
from bdlora_megatron.serve.engine.sampling import Sampler
from bdlora_megatron.serve.messages import Sampling

V = 13
CASES = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "negative": {"presence_penalty": -2.0, "frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.8},
    "encouraged": {"repetition_penalty": 0.6},
    "bias": {"logit_bias": ((2, 5.0), (7, -100.0))},
    "long": {"min_tokens": 4, "stop_ids": frozenset({1, 3})},
    "all": {
        "presence_penalty": 0.4, "frequency_penalty": 0.25, "repetition_penalty": 1.3,
        "logit_bias": ((2, 1.5), (4, -3.0)), "min_tokens": 6, "stop_ids": frozenset({0, 5}),
    },
}  # fmt: skip


def by_hand(logits: list[float], sampling: Sampling, prompt: list[int], said: list[int]):
    """vLLM's order, and in it OpenAI's ``mu[j] - c[j] * frequency - (c[j] > 0) * presence``."""
    bias = dict(sampling.logit_bias)
    out = []
    for token, value in enumerate(logits):
        if len(said) < sampling.min_tokens and token in sampling.stop_ids:
            out.append(-math.inf)
            continue
        mu = value + bias.get(token, 0.0)
        if token in prompt or token in said:
            rate = sampling.repetition_penalty
            mu = mu / rate if mu > 0 else mu * rate
        count = said.count(token)
        mu -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
        out.append(mu)
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_logits_are_changed_as_the_formula_says(case, dtype):
    """A neighbour's logits stay what they are, to the bit."""
    rng = random.Random(3)
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(max_tokens=30, **CASES[case])
    penalties, prompt, said = Penalties(), [3, 5, 5, 8], []
    penalties.add(1, sampling, prompt)
    penalties.add(2, Sampling(), [1, 2])
    for step in range(20):
        logits = (3 * torch.randn(2, V, generator=generator)).to(dtype)
        kept = logits.clone()
        ids = [1, 2] if step % 2 else [2, 1]
        row = ids.index(1)
        got = penalties.applied(logits, ids, idle=-1)
        wanted = by_hand(logits[row].tolist(), sampling, prompt, said)
        exact = 1e-12 if dtype is torch.float64 else 1e-5
        assert got[row].tolist() == pytest.approx(wanted, rel=exact, abs=exact)
        assert torch.equal(got[1 - row], logits[1 - row].to(got.dtype))
        assert torch.equal(logits, kept), "the model's own are still wanted for log-probabilities"
        said.append(rng.choice([2, 3, 5, rng.randrange(V)]))
        penalties.said(1, said[-1])
        penalties.said(2, 2)
    assert len(set(said)) > 4, "too few tokens for a formula"


def test_a_step_without_such_requests_is_left_alone():
    penalties, logits = Penalties(), torch.randn(2, V)
    penalties.add(1, Sampling(stop_ids=frozenset({1}), temperature=0.3), [1])
    assert penalties.applied(logits, [1, 9], idle=-1) is logits
    penalties.add(1, Sampling(presence_penalty=1.0), [1])
    assert penalties.applied(logits, [9, 8], idle=-1) is logits
    assert penalties.applied(logits, [1, 8], idle=1) is logits
    assert penalties.applied(logits, [1, 8], idle=-1) is not logits
    penalties.remove(1)
    assert penalties.applied(logits, [1, 8], idle=-1) is logits


def test_a_penalty_turns_an_answer_away_from_what_was_said_and_is_not_reported():
    sampler, logits = Sampler(), torch.tensor([[2.0, 1.5, 1.0, -3.0]])
    sampler.add(1, Sampling(temperature=0.0, presence_penalty=0.8, logprobs=1), [])
    choices = [sampler.choose(logits, [1])[0] for _ in range(4)]
    assert [choice.token for choice in choices] == [0, 1, 0, 0]
    own = logits.double().log_softmax(-1)[0].tolist()
    for choice in choices:
        assert choice.logprob == pytest.approx(own[choice.token], abs=1e-6)
        assert choice.top[0][0] == 0


def test_a_thrown_away_token_was_not_said():
    sampler, logits = Sampler(), torch.tensor([[2.0, 1.5, 1.0, -3.0]])
    sampler.add(1, Sampling(temperature=0.0, frequency_penalty=2.0), [])
    for _ in range(3):
        sampler.choose(logits, [1], idle=1)
    assert [sampler.choose(logits, [1])[0].token for _ in range(3)] == [0, 1, 2]
