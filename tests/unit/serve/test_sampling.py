"""Choosing tokens: the right distribution, streams of one's own, the right log-probabilities."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.engine.sampling import Sampler, choose_tokens
from bdlora_megatron.serve.messages import Sampling

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9], dtype=torch.float64)


def expected(
    logits: torch.Tensor, temperature: float, top_k: int, min_p: float, top_p: float
) -> dict[int, float]:
    """The distribution in plain Python, most probable first; of equal tokens the lower first."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    ranked = [token for token in ranked if weights[token] >= min_p * max(weights)]
    total = sum(weights[token] for token in ranked)
    kept, before = [], 0.0
    for place, token in enumerate(ranked):
        if before < top_p or place == 0:
            kept.append(token)
        before += weights[token] / total
    mass = sum(weights[token] for token in kept)
    return {token: weights[token] / mass for token in kept}


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "min_p", "top_p"),
    [
        (0, 0.0, 1.0),
        (2, 0.0, 1.0),
        (0, 0.0, 0.6),
        (3, 0.0, 0.9),
        (3, 0.0, 0.7),
        (0, 0.0, 1e-9),
        (0, 0.2, 1.0),
        (0, 0.3, 0.8),
        (2, 0.05, 0.7),
        (0, 1.0, 1.0),
    ],
)
def test_draws_give_the_distribution(temperature, top_k, min_p, top_p):
    """Each token as often as it should be, within five standard deviations of that count."""
    count = 4000
    sampling = Sampling(temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)
    tokens = choose_tokens(LOGITS.expand(count, -1), [sampling] * count, range(count))
    got = torch.bincount(tokens, minlength=5).tolist()
    wanted = expected(LOGITS, temperature, top_k, min_p, top_p)
    for token, seen in enumerate(got):
        p = wanted.get(token, 0.0)
        assert abs(seen - count * p) <= 5 * math.sqrt(count * p * (1 - p)), (token, seen, p)


@pytest.mark.parametrize("limits", [{}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.001}], ids=str)
def test_rounding_changes_no_draw(limits):
    """Logits that differ by noise of 1e-4 choose the same tokens, but for one or two in 780."""
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(26, 8192, generator=generator)
    other = logits + 1e-4 * torch.randn(26, 8192, generator=generator)
    settings, changed = [Sampling(**limits)] * 26, 0
    for turn in range(30):
        draws = range(26 * turn, 26 * turn + 26)
        pair = (choose_tokens(rows, settings, draws) for rows in (logits, other))
        changed += int(torch.ne(*pair).sum())
    assert changed <= 2


def test_a_longer_vocabulary_whose_end_is_padding_draws_the_same():
    """So that the size of a padded vocabulary, which P decides, is no part of the answer."""
    logits = torch.randn(8, 3001, generator=torch.Generator().manual_seed(6))
    padded = torch.nn.functional.pad(logits, (0, 71), value=-math.inf)
    for limits in ({}, {"top_k": 20}):
        settings = [Sampling(temperature=1.5, **limits)] * 8
        wanted = choose_tokens(logits, settings, range(8))
        assert torch.equal(choose_tokens(padded, settings, range(8)), wanted)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "min_p", "top_p"),
    [
        (40, 0.0, 1.0),
        (0, 0.0, 0.7),
        (0, 0.0, 0.999),
        (0, 0.01, 1.0),
        (300, 0.01, 0.9),
        (1024, 0.0, 1.0),
        (1025, 0.0, 1.0),
        (2500, 0.0, 0.95),
    ],
)
@pytest.mark.parametrize("levels", [None, 4], ids=["different", "equal"])
def test_a_large_vocabulary_is_ranked_as_far_as_it_matters(
    temperature, top_k, min_p, top_p, levels
):
    """Also where hundreds of tokens are as probable as the last one that is looked at first."""
    logits = 3 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    if levels is not None:
        logits = (logits * levels / 3).round() * 3 / levels
    sampling = Sampling(temperature=temperature, top_k=top_k, min_p=min_p, top_p=top_p)
    got = choose_tokens(logits.expand(200, -1), [sampling] * 200, range(200)).tolist()
    wanted = expected(logits.double(), temperature, top_k, min_p, top_p)
    assert set(got) <= set(wanted)
    ids, p = torch.tensor(list(wanted)), torch.tensor(list(wanted.values()))
    for draw, token in enumerate(got):
        noise = torch.from_numpy(numpy.random.default_rng(draw).standard_exponential(3000))
        assert token == ids[(p / noise[ids]).argmax()]


def test_each_row_is_drawn_by_its_own_settings():
    logits = 3 * torch.randn(9, 3000, generator=torch.Generator().manual_seed(2))
    limits = [{}, {"top_k": 5}, {"top_k": 2000}, {"top_p": 0.999}, {"min_p": 0.1}]
    settings = [Sampling(temperature=2.0, **limits[row % 5]) for row in range(9)]
    draws = [7 * row % 9 for row in range(9)]
    alone = [
        choose_tokens(logits[row : row + 1], [settings[row]], [draws[row]]).item()
        for row in range(9)
    ]
    assert choose_tokens(logits, settings, draws).tolist() == alone


def test_zero_temperature_takes_the_most_probable():
    settings = [Sampling(temperature=0.0), Sampling(temperature=5.0, top_k=1)]
    assert choose_tokens(LOGITS.expand(2, -1), settings, [98, 99]).tolist() == [1, 1]


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("size", [3, 3000])
def test_draws_of_impossible_tokens_stay_within_bounds(limits, size):
    logits = torch.full((1, size), -math.inf)
    logits[0, 1] = 0.0
    for draw in (0, 1, 2**63 - 1):
        assert choose_tokens(logits, [Sampling(**limits)], [draw]).tolist() == [1]


def test_a_stream_does_not_depend_on_its_neighbours():
    logits = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))

    def tokens(with_others: bool) -> list[int]:
        sampler, got = Sampler(), []
        sampler.add(7, Sampling(seed=3))
        for step in range(30):
            ids = [7]
            if with_others:
                sampler.add(100 + step, Sampling(seed=step))
                ids = [100 + step, 7] if step % 2 else [7, 100 + step]
            rows = torch.stack([logits[step] if i == 7 else -logits[step] for i in ids])
            got.append(sampler.choose(rows, ids)[ids.index(7)].token)
        return got

    assert tokens(True) == tokens(False)
    assert len(set(tokens(False))) > 5


def test_a_token_that_is_thrown_away_takes_nothing_from_the_stream():
    plain, interrupted = Sampler(), Sampler()
    for sampler in (plain, interrupted):
        sampler.add(1, Sampling(seed=5))
    wide = torch.zeros(1, 1000)
    interrupted.choose(wide, [1], idle=1)
    assert interrupted.choose(wide, [1]) == plain.choose(wide, [1])


def test_log_probabilities_are_the_models_own():
    """Neither temperature nor truncation changes what is reported."""
    sampler = Sampler()
    sampler.add(1, Sampling(temperature=0.2, top_k=1, logprobs=2))
    choice = sampler.choose(LOGITS[None], [1])[0]
    logprobs = LOGITS.log_softmax(-1)
    assert choice.token == 1
    assert choice.logprob == pytest.approx(float(logprobs[1]), abs=1e-6)
    assert [token for token, _ in choice.top] == [1, 3]
    assert [value for _, value in choice.top] == pytest.approx(logprobs[[1, 3]].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"max_tokens": 0},
        {"logprobs": 21},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"logit_bias": ((3, 100.5),)},
    ],
    ids=str,
)
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
