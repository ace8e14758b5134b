"""Grammars that answers must follow: before each token, which ones may come next.

Every rank has the same vocabulary, grammar and tokens, and llguidance counts its work instead of
timing it; so all ranks get the same masks, and nothing is sent. What a request has said stays with
the request: one that is preempted and read again goes on where it was.

V is the vocabulary, padded as the model's logits are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.messages import Grammar, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Masks"]

#: Grammars that are kept for the next request with the same.
_KEPT = 64
#: How much of a fault is told.
_TOLD = 600


class Masks:
    """The requests in flight that must follow a grammar.

    Attributes:
        faults: Requests that can't go on, with the reason; until they are removed.
    """

    def __init__(self) -> None:
        self.faults: dict[int, str] = {}
        # Or why one could not be read.
        self._vocabularies: dict[str, LLTokenizer | str] = {}
        # As they are before the first token; read in a thread while prompts wait and are computed.
        self._read: OrderedDict[Grammar, Future[LLMatcher]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._asked: dict[int, LLMatcher | Grammar] = {}

    def learn(self, vocabulary: Vocabulary) -> None:
        """Read a vocabulary that grammars will name; of 128,000 tokens, some seconds."""
        if vocabulary.key in self._vocabularies:
            return
        # Here: an engine that is no server's does without the library.
        from llguidance import LLTokenizer

        read: LLTokenizer | str
        try:
            read = LLTokenizer(vocabulary.text, eos_token=sorted(vocabulary.ends))
        except ValueError as error:
            read = f"the model's tokenizer can't be used for structured output: {error}"[:_TOLD]
        self._vocabularies[vocabulary.key] = read

    def prepare(self, grammar: Grammar | None) -> None:
        """Begin to read a grammar.

        Raises:
            ConfigError: Its vocabulary is not known, or could not be read.
        """
        if grammar is None:
            return
        unknown = "a grammar names a vocabulary that was not sent; send it before"
        vocabulary = self._vocabularies.get(grammar.vocabulary, unknown)
        if isinstance(vocabulary, str):
            raise ConfigError(vocabulary)
        self._future(grammar)

    def add(self, request_id: int, grammar: Grammar | None) -> None:
        """Let a request's answer follow a grammar, if it has one."""
        if grammar is not None:
            self._asked[request_id] = grammar

    def remove(self, request_id: int) -> None:
        """Forget a request."""
        self._asked.pop(request_id, None)
        self.faults.pop(request_id, None)

    def said(self, request_id: int, token: int) -> None:
        """Note a token that was chosen for a request, if that matters to it."""
        matcher = self._asked.get(request_id)
        if matcher is None or isinstance(matcher, Grammar) or request_id in self.faults:
            return
        matcher.consume_token(token)
        self._look(request_id, matcher)

    def applied(
        self, changed: Tensor, logits: Tensor, request_ids: Sequence[int], *, idle: int
    ) -> Tensor:
        """The logits from which tokens are to be chosen.

        Args:
            changed: ``[requests, V]``, with penalties; they are not changed.
            logits: The model's own ``[requests, V]``. Where penalties forbid all that a grammar
                allows, as ``min_tokens`` does at its end, they decide.
            request_ids: Whose rows they are.
            idle: A request whose token will be thrown away.

        Returns:
            ``changed`` itself if nobody has a grammar, else another tensor, in fp32 at least.

        Collectives:
            None.
        """
        rows = [row for row, i in enumerate(request_ids) if i in self._asked and i != idle]
        if not rows:
            return changed
        size = changed.shape[-1]
        bits = numpy.zeros((len(rows), (size + 7) // 8), dtype=numpy.uint8)
        for place, row in enumerate(rows):
            told = self._next(request_ids[row])
            # The tokenizer may have more tokens than the model, or fewer.
            count = min(len(told), bits.shape[1])
            bits[place, :count] = numpy.frombuffer(told, dtype=numpy.uint8)[:count]
        allowed = _unpacked(torch.from_numpy(bits).to(changed.device), size)
        out = changed.to(torch.promote_types(changed.dtype, torch.float32), copy=True)
        at = torch.tensor(rows, device=out.device)
        own = logits[at].to(out.dtype).masked_fill(~allowed, -torch.inf)
        masked = out[at].masked_fill(~allowed, -torch.inf)
        some = (masked > -torch.inf).any(dim=-1, keepdim=True)
        out[at] = torch.where(some, masked, own)
        return out

    def _next(self, request_id: int) -> bytes:
        """A request's mask, one bit a token; of a request that can't go on, anything."""
        if request_id in self.faults:
            return b"\xff"
        matcher = self._asked[request_id]
        if isinstance(matcher, Grammar):
            matcher = self._future(matcher).result().deep_copy()
            self._asked[request_id] = matcher
        bits: bytes = matcher.compute_bitmask()
        self._look(request_id, matcher)
        return bits

    def _look(self, request_id: int, matcher: LLMatcher) -> None:
        if matcher.is_error():
            # Without what follows: the parser's state.
            reason = matcher.get_error().partition("\n<state>")[0][:_TOLD]
            self.faults[request_id] = f"the grammar can't be followed: {reason}"

    def _future(self, grammar: Grammar) -> Future[LLMatcher]:
        if grammar not in self._read:
            from llguidance import LLMatcher

            tokens = self._vocabularies[grammar.vocabulary]
            assert not isinstance(tokens, str), "prepare() has looked"
            self._read[grammar] = self._reader.submit(LLMatcher, tokens, grammar.text, log_level=0)
        self._read.move_to_end(grammar)
        while len(self._read) > _KEPT:
            self._read.popitem(last=False)
        return self._read[grammar]


def _unpacked(bits: Tensor, size: int) -> Tensor:
    """Bytes ``[rows, bytes]`` as truth values ``[rows, size]``, the lowest bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :size].bool()
