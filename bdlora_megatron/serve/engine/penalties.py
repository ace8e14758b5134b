"""What requests ask to be done to their logits before a token is chosen.

In vLLM's order: tokens that would end an answer too early are forbidden, ``logit_bias`` is added,
then come the penalties on what was said before. Requests that ask for nothing cost nothing.

V is the vocabulary, padded as the model's logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdlora_megatron.serve.messages import Sampling

__all__ = ["Penalties"]


@dataclass(slots=True)
class _Said:
    """A request that asks for something, and what was said in it.

    Attributes:
        sampling: What it asks for.
        prompt: Its prompt's tokens.
        tokens: How many were chosen.
        counts: How often each was ``[V]``; with the next two, made when the logits are known.
        read: Which are in the prompt ``[V]``.
        bias: ``logit_bias`` ``[V]``.
    """

    sampling: Sampling
    prompt: tuple[int, ...]
    tokens: int = 0
    counts: Tensor = field(init=False)
    read: Tensor = field(init=False)
    bias: Tensor = field(init=False)

    def begin(self, logits: Tensor) -> None:
        """Make the tensors, like a row of logits."""
        if self.tokens:
            return
        self.counts, self.bias = torch.zeros_like(logits), torch.zeros_like(logits)
        self.read = torch.zeros_like(logits, dtype=torch.bool)
        self.read[self.counts.new_tensor(self.prompt).long()] = True
        if self.sampling.logit_bias:
            ids, values = zip(*self.sampling.logit_bias, strict=True)
            self.bias[self.bias.new_tensor(ids).long()] = self.bias.new_tensor(values)


class Penalties:
    """The requests in flight that ask for other logits than the model's."""

    def __init__(self) -> None:
        self._asked: dict[int, _Said] = {}

    def add(self, request_id: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Note what a request asks for, if it does.

        Args:
            request_id: The request.
            sampling: Its settings.
            prompt: Its tokens, on which ``repetition_penalty`` looks, too.
        """
        if sampling.changes_logits:
            self._asked[request_id] = _Said(sampling, tuple(prompt))

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        self._asked.pop(request_id, None)

    def said(self, request_id: int, token: int) -> None:
        """Note a token that was chosen for a request, if that matters to it."""
        asked = self._asked.get(request_id)
        if asked is not None:
            asked.counts[token] += 1
            asked.tokens += 1

    def applied(self, logits: Tensor, request_ids: Sequence[int], *, idle: int) -> Tensor:
        """The logits from which tokens are to be chosen.

        Args:
            logits: The model's ``[requests, V]``; they are not changed.
            request_ids: Whose rows they are.
            idle: A request whose token will be thrown away.

        Returns:
            The same tensor if nobody asks for anything, else another, in fp32 at least.

        Collectives:
            None.
        """
        rows = [row for row, i in enumerate(request_ids) if i in self._asked and i != idle]
        if not rows:
            return logits
        out = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        asked = [self._asked[request_ids[row]] for row in rows]
        for one in asked:
            one.begin(out[0])
        at = torch.tensor(rows, device=out.device)
        out[at] = _changed(out[at], asked)
        return out


def _changed(logits: Tensor, asked: Sequence[_Said]) -> Tensor:
    """The rows of those who ask."""
    settings = [one.sampling for one in asked]

    def column(values: list[float]) -> Tensor:
        return logits.new_tensor(values)[:, None]

    logits = logits + torch.stack([one.bias for one in asked])
    for row, one in enumerate(asked):
        if one.tokens < one.sampling.min_tokens:
            logits[row, list(one.sampling.stop_ids)] = -torch.inf
    counts = torch.stack([one.counts for one in asked])
    said = counts > 0
    seen = said | torch.stack([one.read for one in asked])
    repetition = column([s.repetition_penalty for s in settings])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(seen, repeated, logits)
    logits = logits - column([s.frequency_penalty for s in settings]) * counts
    return logits - column([s.presence_penalty for s in settings]) * said
