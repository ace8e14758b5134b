"""Choosing the next token of each request, and what it was worth.

Every request draws from a stream of its own, so that what it is given does not depend on who shares
its steps. A draw gives each token of the vocabulary a number of exponential noise, and takes the
token with the largest probability over noise. Who shares a step also decides how logits round: that
moves such a ratio as little as the logit, and changes the token only where two are all but equal. A
cumulated sum would move under everything that stands before a token in the vocabulary.

A draw is named by an integer, found on the host, which seeds the noise; ranks that see the same
logits therefore choose the same token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy
import torch
from torch import Tensor

from bdlora_megatron.serve.engine.masks import Masks
from bdlora_megatron.serve.engine.penalties import Penalties
from bdlora_megatron.serve.messages import Choice, Sampling

__all__ = ["Sampler", "choose_tokens", "top_logprobs"]

#: So many of the most probable tokens are looked at first: sorting a vocabulary takes ten times as
#: long as finding them.
_CANDIDATES = 1024


class Sampler:
    """The random streams of the requests in flight.

    Attributes:
        masks: Those of them that must follow a grammar.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sampling, random.Random]] = {}
        self._penalties = Penalties()
        self.masks = Masks()

    def add(self, request_id: int, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        """Start a request's stream."""
        self._known[request_id] = (sampling, random.Random(sampling.seed))
        self._penalties.add(request_id, sampling, prompt)
        self.masks.add(request_id, sampling.grammar)

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        self._known.pop(request_id, None)
        self._penalties.remove(request_id)
        self.masks.remove(request_id)

    def of(self, request_id: int) -> Sampling:
        """A request's settings."""
        return self._known[request_id][0]

    def choose(self, logits: Tensor, request_ids: Sequence[int], *, idle: int = -1) -> list[Choice]:
        """Choose the next token of each request.

        Args:
            logits: ``[requests, vocabulary]``, the same on every rank.
            request_ids: Whose rows they are.
            idle: A request whose token will be thrown away, as that of a prompt not yet read to its
                end; it keeps its place in its stream.

        Returns:
            The choices, by row. What a token was worth is the model's own word, without penalties
            and masks.

        Collectives:
            None.
        """
        known = [self._known[request_id] for request_id in request_ids]
        draws = [
            0 if sampling.greedy or request_id == idle else stream.getrandbits(63)
            for request_id, (sampling, stream) in zip(request_ids, known, strict=True)
        ]
        settings = [sampling for sampling, _ in known]
        changed = self._penalties.applied(logits, request_ids, idle=idle)
        changed = self.masks.applied(changed, logits, request_ids, idle=idle)
        tokens = choose_tokens(changed, settings, draws).tolist()
        for request_id, token in zip(request_ids, tokens, strict=True):
            if request_id != idle:
                self._penalties.said(request_id, token)
                self.masks.said(request_id, token)
        choices = [Choice(token) for token in tokens]
        asked = {row: s.logprobs for row, s in enumerate(settings) if s.logprobs is not None}
        if asked:
            # All rows at once: one by one, each would wait for the device.
            rows = list(asked)
            these = logits if len(rows) == len(logits) else logits[rows]
            told = top_logprobs(these, [tokens[row] for row in rows], max(asked.values()))
            for (row, count), choice in zip(asked.items(), told, strict=True):
                choices[row] = replace(choice, top=choice.top[:count])
        return choices


def choose_tokens(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[int]) -> Tensor:
    """Choose a token per row.

    Args:
        logits: ``[requests, vocabulary]``.
        settings: Of each row.
        draws: The seed of each row's noise.

    Returns:
        Token ids ``[requests]``.

    Collectives:
        None.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(settings) if not sampling.greedy]
    limited = [row for row in drawn if settings[row].limits]
    free = [row for row in drawn if not settings[row].limits]
    for rows, draw in ((free, _draw_from_all), (limited, _draw_from_best)):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            chosen = [settings[row] for row in rows]
            scaled = logits[index].float() / _column(logits, [s.temperature for s in chosen])
            noise = _noise(scaled, [draws[row] for row in rows])
            tokens[index] = draw(scaled.softmax(dim=-1), chosen, noise)
    return tokens


def _noise(like: Tensor, draws: Sequence[int]) -> Tensor:
    """Exponential noise, each row from its own seed.

    Drawn in fp64: numbers near 0, which choose the improbable tokens, are too coarse in fp32. On a
    CPU NumPy takes a third of torch's time.
    """
    noise, size = torch.empty_like(like), like.shape[-1]
    generator = torch.Generator(like.device)
    for row, draw in zip(noise, draws, strict=True):
        if like.is_cpu:
            drawn = torch.from_numpy(numpy.random.default_rng(draw).standard_exponential(size))
        else:
            drawn = torch.empty(size, dtype=torch.float64, device=like.device)
            drawn.exponential_(generator=generator.manual_seed(draw))
        row.copy_(drawn)
    return noise


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _draw_from_all(probabilities: Tensor, settings: Sequence[Sampling], noise: Tensor) -> Tensor:
    """Any token may be drawn; nothing is sorted, which would take most of a step."""
    del settings
    return (probabilities / noise).argmax(dim=-1)


def _draw_from_best(
    probabilities: Tensor,
    settings: Sequence[Sampling],
    noise: Tensor,
    candidates: int = _CANDIDATES,
) -> Tensor:
    """Those tokens may be drawn that ``top_k``, ``min_p`` and ``top_p`` leave, best first."""
    size = probabilities.shape[-1]
    count = min(candidates, size)
    best, ids = _best(probabilities, count)
    top_k, min_p, top_p = (
        _column(probabilities, values)
        for values in zip(*((s.top_k or size, s.min_p, s.top_p) for s in settings), strict=True)
    )
    allowed = torch.arange(count, device=best.device) < top_k
    least = min_p * best[:, :1]
    allowed &= best >= least
    # top_p looks at what these two leave, as in vLLM; without top_k, also beyond the candidates.
    left = torch.where(allowed, best, 0.0)
    everything = torch.where(probabilities >= least, probabilities, 0.0).sum(-1, keepdim=True)
    total = torch.where(top_k < size, left.sum(-1, keepdim=True), everything)
    allowed &= left.cumsum(dim=-1) - left < top_p * total
    # The most probable token stays allowed whatever rounding did.
    allowed[:, 0] = True
    ratios = torch.where(allowed, best / noise.gather(1, ids), -1.0)
    tokens = ids.gather(1, ratios.argmax(dim=-1, keepdim=True))[:, 0]
    if count < size:
        # Of those as probable as the last candidate, chance decided which became candidates.
        last = best[:, -1:]
        reached = (allowed & (best == last) & (last > 0)).any(dim=-1, keepdim=True)
        short = (reached | ((top_k > count) & (top_k < size))).nonzero()[:, 0]
        if len(short):
            these = [settings[row] for row in short.tolist()]
            tokens[short] = _draw_from_best(probabilities[short], these, noise[short], size)
    return tokens


def _best(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens and their ids, best first; of equal ones the lower id first."""
    if count == probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    ids = probabilities.topk(count).indices.sort(dim=-1).values
    best, places = probabilities.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, places)


def top_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[Choice]:
    """The log-probabilities of a token in each row, and of the most probable ones.

    Args:
        logits: ``[rows, vocabulary]``.
        tokens: One a row.
        count: How many of the most probable ones.

    Collectives:
        None.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    tops = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        Choice(token, value, tuple(zip(*top, strict=True)))
        for token, value, top in zip(tokens, own, tops, strict=True)
    ]
