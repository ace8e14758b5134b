"""Choosing the next token of each request, and what it was worth.

Every request draws from a stream of its own, so that what it is given does not depend on who shares
its steps. A draw is one number between 0 and 1, found on the host, and picks from the cumulated
probabilities; ranks that see the same logits therefore choose the same token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bdlora_megatron.serve.engine.penalties import Penalties
from bdlora_megatron.serve.messages import Choice, Sampling

__all__ = ["Sampler", "choose_tokens", "worths"]


class Sampler:
    """The random streams of the requests in flight."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Sampling, random.Random]] = {}
        self._penalties = Penalties()

    def add(self, request_id: int, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        """Start a request's stream.

        Args:
            request_id: The request.
            sampling: Its settings.
            prompt: Its tokens.
        """
        self._known[request_id] = (sampling, random.Random(sampling.seed))
        self._penalties.add(request_id, sampling, prompt)

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        self._known.pop(request_id, None)
        self._penalties.remove(request_id)

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
            The choices, by row. What a token was worth is the model's own word, without penalties.

        Collectives:
            None.
        """
        known = [self._known[request_id] for request_id in request_ids]
        draws = [
            0.0 if sampling.greedy or request_id == idle else stream.random()
            for request_id, (sampling, stream) in zip(request_ids, known, strict=True)
        ]
        settings = [sampling for sampling, _ in known]
        changed = self._penalties.applied(logits, request_ids, idle=idle)
        tokens = choose_tokens(changed, settings, draws).tolist()
        for request_id, token in zip(request_ids, tokens, strict=True):
            if request_id != idle:
                self._penalties.said(request_id, token)
        choices = [Choice(token) for token in tokens]
        asked = {row: s.logprobs for row, s in enumerate(settings) if s.logprobs is not None}
        if asked:
            # All rows at once: one by one, each would wait for the device.
            rows = list(asked)
            these = logits if len(rows) == len(logits) else logits[rows]
            told = worths(these, [tokens[row] for row in rows], max(asked.values()))
            for (row, count), choice in zip(asked.items(), told, strict=True):
                choices[row] = replace(choice, top=choice.top[:count])
        return choices


def choose_tokens(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """Choose a token per row.

    Args:
        logits: ``[requests, vocabulary]``.
        settings: Of each row.
        draws: A number in [0, 1) for each row.

    Returns:
        Token ids ``[requests]``.

    Collectives:
        None.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(settings) if not sampling.greedy]
    if not drawn:
        return tokens

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    chosen = [settings[row] for row in drawn]
    rows = torch.tensor(drawn, device=logits.device)
    scaled = logits[rows].float() / column([sampling.temperature for sampling in chosen])
    probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    allowed = place < column([float(s.top_k or logits.shape[-1]) for s in chosen])
    allowed &= probabilities >= column([s.min_p for s in chosen]) * probabilities[:, :1]
    # top_p looks at what these two leave, as in vLLM.
    left = torch.where(allowed, probabilities, 0.0)
    left = left / left.sum(dim=-1, keepdim=True)
    allowed &= left.cumsum(dim=-1) - left < column([sampling.top_p for sampling in chosen])
    # The most probable token stays allowed whatever rounding did.
    allowed[:, 0] = True
    kept = torch.where(allowed, probabilities, 0.0).cumsum(dim=-1)
    target = column([draws[row] for row in drawn]) * kept[:, -1:]
    # The first place whose cumulated probability exceeds the draw: one of zero width never is.
    pick = (kept <= target).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    last = allowed.sum(dim=-1) - 1
    pick = torch.minimum(pick, last)
    tokens[rows] = order.gather(1, pick[:, None])[:, 0]
    return tokens


def worths(logits: Tensor, tokens: Sequence[int], count: int) -> list[Choice]:
    """The log-probabilities of a token in each row, and of the most probable ones.

    Args:
        logits: ``[rows, vocabulary]``.
        tokens: One a row.
        count: How many of the most probable ones.

    Returns:
        The tokens with their log-probabilities, by row.

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
