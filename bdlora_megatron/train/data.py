"""Rows of examples, and which rows a rank computes in which step.

Nothing here has a state: what a step sees is a function of the seed and the step's number, so a
resumed run sees what it would have seen, also over another number of ranks. Letters in shapes:
b rows of a micro-batch, S positions in a row.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.invocation import active_from
from bdlora_megatron.train.examples import Example

__all__ = ["Batch", "ContextShare", "RowDataset", "ShareOfBatch", "check_invocation", "pack"]

_OPEN_ROWS = 64
#: Examples in which invocation tokens are looked for before a run.
_LOOKED_AT = 1000
#: Attention over padding costs with the square of its length.
_PADDING = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """What the queries of one context-parallel rank attend to.

    The rank holds two pieces of each example: of 2 C equal pieces, over C ranks, rank r has those
    numbered r and 2 C - 1 - r, so that all ranks have the same work under a causal mask. Megatron-
    Core's rotary embedding and Transformer Engine's attention split examples in this way.

    Attributes:
        query_starts: ``[2 examples + 1]`` int32: where each piece begins on this rank, and its end.
        longest_query: Tokens of the longest piece.
        keys: For each piece, where the keys up to its end stand among all ranks' tokens, rank after
            rank.
        key_starts: ``[2 examples + 1]`` int32: where each piece's begin in ``keys``, and its end.
        longest_key: The most keys of a piece.
    """

    query_starts: Tensor
    longest_query: int
    keys: Tensor
    key_starts: Tensor
    longest_key: int

    def to(self, device: torch.device) -> ContextShare:
        """The same on ``device``."""
        return replace(
            self,
            query_starts=self.query_starts.to(device),
            keys=self.keys.to(device),
            key_starts=self.key_starts.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch: its rows one after another, T = b S tokens.

    Attributes:
        tokens: ``[1, T]``; of one of C context-parallel ranks T / C, likewise below.
        labels: ``[T]``, the token that follows each.
        learnt: ``[n]``, the places of the labels that count in the loss.
        starts: ``[examples + 1]`` int32: where each example begins in the whole batch, and T. What
            is left of a row is cut into short examples of which nothing is learnt.
        longest: Tokens of the longest example.
        acts: ``[1, T]``: the tokens on which an Activated LoRA acts; None for one that acts on all.
        share: Of a context-parallel rank, where there are several.
    """

    tokens: Tensor
    labels: Tensor
    learnt: Tensor
    starts: Tensor
    longest: int
    acts: Tensor | None = None
    share: ContextShare | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            labels=self.labels.to(device),
            learnt=self.learnt.to(device),
            starts=self.starts.to(device),
            acts=None if self.acts is None else self.acts.to(device),
            share=self.share and self.share.to(device),
        )

    def on_context_rank(self, rank: int, size: int) -> Batch:
        """What one of ``size`` context-parallel ranks computes.

        Args:
            rank: Its number among them.
            size: How many they are; examples are multiples of twice as many positions.

        Returns:
            The tokens of its pieces; the batch itself where there is one rank.
        """
        if size == 1:
            return self
        starts = self.starts.to(torch.int64)
        piece = starts.diff() // (2 * size)
        both = piece.repeat_interleave(2)

        def first(number: int) -> Tensor:
            """Where the two pieces of a rank begin, example after example."""
            places = torch.tensor([number, 2 * size - 1 - number])
            return (starts[:-1, None] + piece[:, None] * places).flatten()

        own = _spans(first(rank), both)
        gathered = torch.cat([_spans(first(number), both) for number in range(size)])
        seen = piece[:, None] * torch.tensor([rank + 1, 2 * size - rank])
        learnt = torch.zeros(len(self.labels), dtype=torch.bool)
        learnt[self.learnt] = True
        return replace(
            self,
            tokens=self.tokens[:, own],
            labels=self.labels[own],
            learnt=learnt[own].nonzero()[:, 0],
            acts=None if self.acts is None else self.acts[:, own],
            share=ContextShare(
                query_starts=_starts(both),
                longest_query=int(both.max()),
                keys=gathered.argsort()[_spans(starts[:-1].repeat_interleave(2), seen.flatten())],
                key_starts=_starts(seen.flatten()),
                longest_key=int(seen.max()),
            ),
        )


def _spans(firsts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each of ``firsts`` on, as many as ``lengths`` says, one after another."""
    begins = lengths.cumsum(0) - lengths
    return (firsts - begins).repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def check_invocation(examples: Sequence[Example], invocation_tokens: tuple[int, ...]) -> list[str]:
    """Look for the tokens from which an Activated LoRA acts in the first examples.

    Args:
        examples: What is to be learnt.
        invocation_tokens: The adapter's; none acts on every token.

    Returns:
        What to tell: how many lack them, and teach the adapter nothing.

    Raises:
        ConfigError: None has them.
    """
    looked = min(len(examples), _LOOKED_AT) if invocation_tokens else 0
    lacking = sum(
        active_from(examples[index].tokens.tolist(), invocation_tokens) is None
        for index in range(looked)
    )
    if looked and lacking == looked:
        raise ConfigError(
            f"peft.invocation_tokens is {list(invocation_tokens)}, and none of the first {looked} "
            "examples has them in a row, so that nothing would be learnt; see what the tokenizer "
            "makes of the examples, chat template included"
        )
    if not lacking:
        return []
    return [
        f"{lacking} of the first {looked} examples lack peft.invocation_tokens; the adapter does "
        "not act on them and learns nothing from them"
    ]


def pack(
    lengths: NDArray[np.int64], seq_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put examples into as few rows as a quick look allows: the first open row with room.

    Args:
        lengths: Positions of each example, each at most ``seq_length``.
        seq_length: Positions in a row.

    Returns:
        The examples' indices, row after row, every one exactly once; and ``[rows + 1]`` where each
        row begins among them.
    """
    order, starts = array("q"), array("q", [0])
    rows: list[list[int]] = []
    rooms = np.zeros(0, dtype=np.int64)

    def close(row: list[int]) -> None:
        order.extend(row)
        starts.append(len(order))

    for index, length in enumerate(lengths.tolist()):
        fits = rooms >= length
        place = int(fits.argmax()) if fits.any() else len(rows)
        if place == len(rows):
            if len(rows) == _OPEN_ROWS:
                close(rows.pop(0))
                rooms, place = rooms[1:], place - 1
            rows.append([])
            rooms = np.append(rooms, seq_length)
        rows[place].append(index)
        rooms[place] -= length
    for row in rows:
        close(row)
    return np.asarray(order), np.asarray(starts)


class RowDataset:
    """Examples in rows of equal length.

    Rows with several examples keep them apart: none attends to another, no label reaches from one
    into the next, and rotary embedding counts positions from each example's start. So an example
    computes the same wherever it stands.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        seq_length: int,
        *,
        packing: bool,
        seed: int,
        cp_size: int = 1,
        invocation_tokens: tuple[int, ...] = (),
    ) -> None:
        """Lay examples out in rows.

        Args:
            examples: None is longer than a row.
            seq_length: Positions in a row.
            packing: Put several examples into a row.
            seed: Of their order.
            cp_size: Context-parallel ranks that examples are cut for; ``seq_length`` is a multiple
                of twice as many.
            invocation_tokens: From whose last occurrence in an example on an Activated LoRA acts.
        """
        self.seq_length = seq_length
        self._examples, self._seed = examples, seed
        self._multiple = 1 if cp_size == 1 else 2 * cp_size
        self._invocation = invocation_tokens
        lengths = getattr(examples, "lengths", None)
        if lengths is None:
            lengths = np.array([len(example) for example in examples], dtype=np.int64)
        shuffled = _shuffled(len(examples), seed)
        if packing:
            order, self._starts = pack(self._filled(lengths[shuffled]), seq_length)
            self._order = shuffled[order]
        else:
            self._order, self._starts = shuffled, np.arange(len(shuffled) + 1)
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._starts) - 1

    def in_training_order(self, number: int) -> int:
        """The row that stands at place ``number`` of an endless walk over shuffled epochs."""
        epoch, place = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, _shuffled(len(self), f"{self._seed} {epoch}"))
        return int(self._epoch[1][place])

    def batch(self, rows: Sequence[int | None]) -> Batch:
        """Make a micro-batch.

        Args:
            rows: Indices of rows; None gives an empty row, which counts for nothing.

        Returns:
            The batch, on the CPU.
        """
        size = self.seq_length
        tokens, labels = (torch.zeros(len(rows) * size, dtype=torch.int64) for _ in range(2))
        learnt, acts = (torch.zeros(len(rows) * size, dtype=torch.bool) for _ in range(2))
        lengths: list[int] = []
        padding = self._filled(_PADDING)
        for place, row in enumerate(rows):
            start, end = place * size, (place + 1) * size
            for index in self._row(row):
                example = self._examples[index]
                here = slice(start, start + len(example))
                # A copy: what lies on disk is read-only.
                ids = torch.tensor(example.tokens, dtype=torch.int64)
                tokens[here], labels[here] = ids[:-1], ids[1:]
                learnt[here] = torch.from_numpy(example.learnt[1:])
                if self._invocation:
                    # In the whole example, as in PEFT: its last token is no input here.
                    first = active_from(ids.tolist(), self._invocation)
                    acts[here][len(ids) if first is None else first :] = True
                lengths.append(self._filled(len(example)))
                start += lengths[-1]
            lengths += [min(padding, end - at) for at in range(start, end, padding)]
        return Batch(
            tokens=tokens[None],
            labels=labels,
            learnt=learnt.nonzero()[:, 0],
            starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            longest=max(lengths),
            acts=acts[None] if self._invocation else None,
        )

    def _filled(self, length: Any) -> Any:
        """Positions of examples with those that fill up their last piece; nothing sees these."""
        return -(-length // self._multiple) * self._multiple

    def _row(self, row: int | None) -> list[int]:
        if row is None:
            return []
        found: list[int] = self._order[self._starts[row] : self._starts[row + 1]].tolist()
        return found


def _shuffled(size: int, seed: int | str) -> NDArray[np.int64]:
    """The numbers from 0 in an order that depends on the seed alone."""
    order = array("q", range(size))
    # Not numpy's, which promises no order from release to release.
    random.Random(seed).shuffle(order)
    return np.asarray(order)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareOfBatch:
    """Which rows of a global batch one data-parallel rank computes, micro-batch by micro-batch.

    Attributes:
        multiple: A rank's micro-batches are a multiple of this.

    Raises:
        ConfigError: The global batch does not divide over micro-batches and ranks.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size * self.multiple):
            self._refuse()

    def _refuse(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ConfigError(
                f"train.global_batch_size is {self.global_batch_size}; it must be a multiple of "
                f"micro_batch_size={self.micro_batch_size} x {self.dp_size} data-parallel ranks"
            )
        raise ConfigError(
            f"each data-parallel rank has {self.num_microbatches} micro-batches in a step; an "
            f"interleaved pipeline of {self.multiple} stages takes a multiple of as many: change "
            "train.global_batch_size or train.micro_batch_size"
        )

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def numbers(self, step: int) -> list[list[int]]:
        """Places in the walk over the data, for each micro-batch of step ``step`` (from 0)."""
        first = step * self.global_batch_size
        return [
            [
                first + (micro * self.dp_size + self.dp_rank) * self.micro_batch_size + row
                for row in range(self.micro_batch_size)
            ]
            for micro in range(self.num_microbatches)
        ]
