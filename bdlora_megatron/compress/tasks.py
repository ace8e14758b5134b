"""What worker processes do: one module of a collection at a time, the result into a file.

Each task's numbers depend on its arguments alone: one thread computes it, whatever the number of
workers. Letters in shapes: I in features, O out features, r one adapter's rank, R the sum of all,
n adapters, c candidates, C clusters, N blocks, k columns of a basis, s rows of a sketch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from bdlora_megatron.compress.cores import Projector
from bdlora_megatron.compress.fit import Basis, fit_basis
from bdlora_megatron.compress.opened import OpenAdapters
from bdlora_megatron.compress.options import CompressOptions
from bdlora_megatron.compress.sources import Source
from bdlora_megatron.compress.stack import Pair, gram_norm2, slices_of, stack_pairs
from bdlora_megatron.convert.adapter import ModuleKey
from bdlora_megatron.convert.tensor_files import write_safetensors
from bdlora_megatron.errors import UnsupportedError

__all__ = ["Desk", "FinishTask", "RoundTask", "SeedTask", "Task"]

#: Sides wider than this are looked at through as many random mixtures of their rows for seeds.
_SKETCH = 256


class Desk:
    """What a process needs for its tasks: the adapters in their order, and the options."""

    def __init__(self, sources: Sequence[Source], options: CompressOptions) -> None:
        self.options = options
        self.opened = OpenAdapters(sources)

    def load(self, number: int, key: ModuleKey) -> _Update:
        """Read a module of an adapter, cut into slices."""
        factors = self.opened.module(number, key)
        pairs = slices_of(factors, self.options.num_blocks)
        norm2 = factors.scale**2 * sum(map(gram_norm2, pairs))
        return _Update(pairs=pairs, scale=factors.scale, norm2=norm2)


@dataclass(frozen=True, slots=True)
class _Update:
    pairs: list[Pair]
    scale: float
    norm2: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One module's work.

    Attributes:
        key: The module.
        target: The file to write.
        adapters: The adapters that have the module, by number, in order.
    """

    key: ModuleKey
    target: Path
    adapters: tuple[int, ...]

    def run(self, desk: Desk) -> None:
        """Do it and write the file, at once and whole."""
        found = self.compute(desk)
        # The largest type first, so that every tensor is aligned.
        tensors = dict(sorted(found.items(), key=lambda item: -item[1].itemsize))
        facts = {name: tensor.to("meta") for name, tensor in tensors.items()}
        partial = self.target.with_suffix(f".{os.getpid()}.partial")
        with write_safetensors(partial, facts) as write:
            for name, tensor in tensors.items():
                write(name, tensor)
        partial.replace(self.target)

    def compute(self, desk: Desk) -> dict[str, Tensor]:
        """The tensors to write."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedTask(Task):
    """What the space of each candidate alone holds of every adapter.

    Attributes:
        candidates: Some of the adapters.
    """

    candidates: tuple[int, ...]

    def compute(self, desk: Desk) -> dict[str, Tensor]:
        """`held [c, n]`: shares of the squared norm, of sketches where sides are wide."""
        sketches = []
        for number in self.adapters:
            factors = desk.opened.module(number, self.key)
            ((B, A),) = slices_of(factors, 1)
            sketches.append((_sketch(B, 1), _sketch(A.t(), 2).t()))
        norms2 = [gram_norm2(pair) for pair in sketches]
        live = [i for i, norm2 in enumerate(norms2) if norm2 > 0]
        # An adapter without an update is held by anyone.
        held = torch.ones(len(self.candidates), len(self.adapters), dtype=torch.float64)
        if not live:
            return {"held": held}
        stack = stack_pairs([sketches[i] for i in live], [norms2[i] ** -0.5 for i in live])
        # As the stack has them.
        columns = torch.tensor(sorted(live, key=lambda i: sketches[i][1].shape[0]))
        place = {number: i for i, number in enumerate(self.adapters)}
        for row, candidate in enumerate(self.candidates):
            if candidate not in place:
                held[row, columns] = 0.0
                continue
            U, V = _own_space(sketches[place[candidate]], desk.options.rank)
            seen = zip(
                stack.parts(stack.left.t() @ U), stack.parts(stack.right.t() @ V), strict=True
            )
            held[row, columns] = torch.cat([(l.mT @ r).square().sum((1, 2)) for l, r in seen])
        return {"held": held}


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTask(Task):
    """What each cluster's basis, fitted to its active adapters, would lose of every adapter.

    Attributes:
        clusters: The active adapters of each.
    """

    clusters: tuple[tuple[int, ...], ...]

    def compute(self, desk: Desk) -> dict[str, Tensor]:
        """`lost2 [n, C]`, squared Frobenius norms, and `norm2 [n]`, those of the updates."""
        projectors: list[list[Projector]] = []
        for members in map(set, self.clusters):
            own = [i for i in self.adapters if i in members]
            bases = _fit(desk, [desk.load(i, self.key) for i in own]) if own else []
            projectors.append([Projector(b.U, b.V, desk.options.core) for b in bases])
        lost2 = torch.empty(len(self.adapters), len(self.clusters), dtype=torch.float64)
        norm2 = torch.empty(len(self.adapters), dtype=torch.float64)
        for row, number in enumerate(self.adapters):
            update = desk.load(number, self.key)
            norm2[row] = update.norm2
            for column, slices in enumerate(projectors):
                # A cluster none of whose adapters has the module keeps nothing of it.
                lost2[row, column] = _lost2(update, slices) if slices else update.norm2
        return {"lost2": lost2, "norm2": norm2}


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishTask(Task):
    """One module of one cluster as it will be stored.

    Attributes:
        active: The adapters to fit the basis to, some of `adapters`.
    """

    active: tuple[int, ...]

    def compute(self, desk: Desk) -> dict[str, Tensor]:
        """`U`, `V` and `S [n, N, k, k]` or `[n, N, k]` in their type; `lost2` and `norm2`, `[n]`.

        Raises:
            UnsupportedError: If the type does not reach the core's numbers.
        """
        dtype, core = desk.options.dtype, desk.options.core
        assert dtype is not None, "the driver has chosen one"
        updates = [desk.load(number, self.key) for number in self.adapters]
        active = set(self.active)
        chosen = [u for u, i in zip(updates, self.adapters, strict=True) if i in active]
        bases = _fit(desk, chosen or updates)
        projectors = [Projector(b.U.to(dtype), b.V.to(dtype), core) for b in bases]
        width = max(projector.U.shape[1] for projector in projectors)
        lost2 = torch.zeros(len(updates), dtype=torch.float64)
        stored = []
        for row, update in enumerate(updates):
            parts = [
                projector.project(pair, update.scale)
                for projector, pair in zip(projectors, update.pairs, strict=True)
            ]
            lost2[row] = sum(error2 for _, error2 in parts)
            stored.append(torch.stack([_padded_core(part, width) for part, _ in parts]))
        S = torch.stack(stored)
        if not S.isfinite().all():
            raise UnsupportedError(
                f"cores of {self.key} exceed {torch.finfo(dtype).max:.5g}, the largest number of "
                f"{dtype}; pass another --dtype"
            )
        norm2 = torch.tensor([update.norm2 for update in updates], dtype=torch.float64)
        sides = ([getattr(p, side) for p in projectors] for side in ("U", "V"))
        U, V = (
            torch.stack([pad(part, (0, width - part.shape[1])) for part in side]) for side in sides
        )
        return {"U": U, "V": V, "S": S, "lost2": lost2, "norm2": norm2}


def _fit(desk: Desk, updates: Sequence[_Update]) -> list[Basis]:
    """A basis for each slice of updates that weigh alike, whatever their norms."""
    live = [update for update in updates if update.norm2 > 0]
    width = desk.options.rank // desk.options.num_blocks
    bases = []
    for number in range(desk.options.num_blocks):
        if not live:
            B, A = updates[0].pairs[number]
            bases.append(Basis(U=_first_axis(B.shape[0]), V=_first_axis(A.shape[1])))
            continue
        weights = [update.scale / update.norm2**0.5 for update in live]
        stack = stack_pairs([update.pairs[number] for update in live], weights)
        bases.append(fit_basis(stack, width, core=desk.options.core))
    return bases


def _first_axis(features: int) -> Tensor:
    return torch.eye(features, 1, dtype=torch.float64)


def _lost2(update: _Update, projectors: Sequence[Projector]) -> float:
    return sum(
        projector.project(pair, update.scale)[1]
        for projector, pair in zip(projectors, update.pairs, strict=True)
    )


def _padded_core(core: Tensor, width: int) -> Tensor:
    missing = width - core.shape[0]
    return pad(core, (0, missing) if core.dim() == 1 else (0, missing, 0, missing))


def _sketch(side: Tensor, seed: int) -> Tensor:
    """`[s, r]` random mixtures of the rows `[O, r]`, or the rows where they are few."""
    if side.shape[0] <= _SKETCH:
        return side.double()
    return (_mixing(_SKETCH, side.shape[0], seed) @ side.float()).double()


@functools.lru_cache(maxsize=2)
def _mixing(rows: int, features: int, seed: int) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def _own_space(pair: Pair, rank: int) -> tuple[Tensor, Tensor]:
    """The leading directions of one update, `[O, r]` and `[I, r]`."""
    (left, left_tip), (right, right_tip) = (
        torch.linalg.qr(side) for side in (pair[0], pair[1].t())
    )
    U, sizes, Vh = torch.linalg.svd(left_tip @ right_tip.t())
    keep = min(rank, int((sizes > 1e-12 * sizes[0]).sum()))
    return left @ U[:, :keep], right @ Vh[:keep].t()
