"""What a model makes of the prompts themselves: the log-probability of each of their tokens.

A prompt is read in one step or in chunks, and read again where its cache was given up in between.
Each step that reads some of it gives the log-probabilities of the tokens that follow what it read;
those of a token known before are the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from bdlora_megatron.serve.engine.sampling import top_logprobs
from bdlora_megatron.serve.messages import Choice

__all__ = ["PromptScores", "Span"]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one request in a step.

    Attributes:
        request_id: Whose.
        first: The place of the first in the request's sequence.
        length: How many.
    """

    request_id: int
    first: int
    length: int


@dataclass(slots=True)
class _Prompt:
    ids: tuple[int, ...]
    count: int
    known: dict[int, Choice] = field(default_factory=dict)

    @property
    def is_read(self) -> bool:
        return len(self.known) == len(self.ids) - 1


class PromptScores:
    """The prompts in flight whose log-probabilities were asked for."""

    def __init__(self) -> None:
        self._prompts: dict[int, _Prompt] = {}

    def add(self, request_id: int, ids: tuple[int, ...], count: int) -> None:
        """Ask for a prompt's.

        Args:
            request_id: Its request.
            ids: Its tokens.
            count: Report so many of the most probable tokens, too, in each place.
        """
        self._prompts[request_id] = _Prompt(ids, count)

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        self._prompts.pop(request_id, None)

    def take(self, request_id: int) -> tuple[Choice, ...]:
        """Hand a whole prompt's over, once.

        Args:
            request_id: Its request; one that asked for nothing gets nothing.

        Returns:
            Those of its tokens from the second on; empty while it is not read to its end.
        """
        prompt = self._prompts.get(request_id)
        if prompt is None or not prompt.is_read:
            return ()
        del self._prompts[request_id]
        return tuple(prompt.known[place] for place in range(1, len(prompt.ids)))

    @property
    def pending(self) -> bool:
        """Whether any request waits for its prompt's."""
        return bool(self._prompts)

    def wanted(self, request_ids: Iterable[int]) -> bool:
        """Whether a step of these requests needs logits of every token, not of the last ones."""
        return any(
            request_id in self._prompts and not self._prompts[request_id].is_read
            for request_id in request_ids
        )

    def read(self, logits: Tensor, spans: Iterable[Span]) -> None:
        """Note what a step gave.

        Args:
            logits: ``[tokens, vocabulary]`` of all tokens of the step, the same on every rank.
            spans: Which they are, in order.

        Collectives:
            None.
        """
        start = 0
        for span in spans:
            rows = logits[start : start + span.length]
            start += span.length
            prompt = self._prompts.get(span.request_id)
            if prompt is None:
                continue
            # Each token's logits are about the one after it.
            following = prompt.ids[span.first + 1 : span.first + 1 + span.length]
            if not following:
                continue
            choices = top_logprobs(rows[: len(following)], following, prompt.count)
            for place, choice in enumerate(choices, start=span.first + 1):
                prompt.known[place] = choice
