"""What a mixed step runs, kernel by kernel: the cost model's counts for adapters in slots.

On a GPU the grouped product is two kernels in each layer, as ``plan.work`` counts them. On a CPU it
is what ``ops.cpu`` does: an adapter with several tokens takes matrix products of its own, the
others' rows are read one by one for all of them together.

Letters: T tokens, U adapters, J projections of a layer, I and O a rank's own input and output
features, k the rank rows of a projection that a rank reads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bdlora_megatron.config import Layout
from bdlora_megatron.models.shape import Linear, ModelShape
from bdlora_megatron.ops.cpu import ROWS_READ_AGAIN
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work
from bdlora_megatron.plan.work import (
    AdapterLoad,
    Message,
    Product,
    Step,
    Work,
    adapter_work,
    exchanged,
    local_factors,
    multiply,
    traverse,
)

__all__ = ["mixed_work"]

#: Bytes of an index.
_INDEX = 8
#: Small kernels that describe a batch for layers of one kind, and for each of their tensors.
_PLAN, _BAGS = 5, 36


def mixed_work(
    shape: ModelShape, at: LocalStep, tp: int, load: AdapterLoad | None, *, fused: bool
) -> Work:
    """One forward pass of the whole model, whose tokens take a load's adapters in turn.

    Args:
        shape: The base model.
        at: The batch.
        tp: Tensor-parallel ranks.
        load: The adapters; none for the base model alone.
        fused: On a GPU; else what a CPU runs.

    Returns:
        Every kernel and every collective of one rank.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide.
    """
    base = local_work(shape, at, tp)
    if load is None:
        return base
    once: list[Product] = []
    if fused:
        step = Step(tokens=at.tokens, context=at.cached, bytes_per_element=at.bytes_per_element)
        layer = adapter_work(shape, step, load, tp)
    else:
        layer, once = _on_cpu(shape, at, tp, load)
    return Work(
        products=(*base.products, *shape.num_layers * layer.products, *once),
        messages=(*base.messages, *shape.num_layers * layer.messages),
    )


def _on_cpu(
    shape: ModelShape, at: LocalStep, tp: int, load: AdapterLoad
) -> tuple[Work, list[Product]]:
    """What adapters add to one decoder layer, and the kernels that describe the batch once."""
    size = at.bytes_per_element
    counts = [len(range(first, at.tokens, load.distinct)) for first in range(load.distinct)]
    products: list[Product] = []
    messages: list[Message] = []
    linears = load.linears(shape)
    grouped = [_grouped(shape, linear, load, tp, size) for linear in linears]
    for linear, layer in zip(linears, grouped, strict=True):
        products += layer.forward(counts)
        messages += exchanged(linear, size * at.tokens, load, layer.slices * layer.rank, tp)
    # Layers whose slots hold the same rows share what they read of the batch.
    plans = {layer.slices: layer for layer in grouped}.values()
    described = [kernel for layer in plans for kernel in layer.describe(counts)]
    return Work(products=tuple(products), messages=tuple(messages)), described


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grouped:
    """One layer's grouped product on one rank.

    Attributes:
        inputs: I.
        widths: O of each projection.
        interleaved: The rows of its projections alternate, head by head.
        rank: k.
        whole: Ranks that ``expand`` reads: k, or all ranks' where they were gathered.
        exchanges: Ranks meet in between.
        size: Bytes of an element.
    """

    inputs: int
    widths: tuple[int, ...]
    interleaved: bool
    rank: int
    whole: int
    exchanges: bool
    size: int

    @property
    def slices(self) -> int:
        """J."""
        return len(self.widths)

    def forward(self, counts: Sequence[int]) -> Iterator[Product]:
        """Kernels of one layer."""
        few, many = self._split(counts)
        total = sum(counts)
        if self.exchanges:
            yield traverse(total * self.slices * self.rank, self.size)
        if self.whole > self.rank:
            # Taken apart by rank, and brought into the order of B's rows.
            yield from [traverse(2 * total * self.slices * self.whole, self.size)] * 2
        if few:
            yield from self._shrink_rows(sum(few), total)
        if many:
            yield from self._shrink_matrices(many, gathered=len(counts) > 1)
        for width in self.widths if few else ():
            yield from self._expand_rows(width, sum(few), everyone=not many)
        if many:
            yield from self._expand_matrices(many, gathered=len(counts) > 1)

    def _split(self, counts: Sequence[int]) -> tuple[list[int], list[int]]:
        few = [count for count in counts if (count - 1) * self.rank <= ROWS_READ_AGAIN]
        return few, [count for count in counts if (count - 1) * self.rank > ROWS_READ_AGAIN]

    def _shrink_rows(self, tokens: int, total: int) -> Iterator[Product]:
        size, entries = self.size, tokens * self.slices * self.rank
        yield Product(
            flops=2.0 * entries * self.inputs,
            bytes=size * (entries * (self.inputs + 1) + total * self.inputs) + 2 * _INDEX * entries,
        )
        yield Product(flops=0.0, bytes=(2 * size + _INDEX) * entries)

    def _shrink_matrices(self, counts: Sequence[int], *, gathered: bool) -> Iterator[Product]:
        size, tokens, columns = self.size, sum(counts), self.slices * self.rank
        if gathered:
            yield traverse(2 * tokens * self.inputs, size)
            yield traverse(2 * tokens * columns, size)
        for count in counts:
            yield multiply(count, self.inputs, columns, size)
            if self.slices > 1:
                yield from [traverse(2 * count * self.rank, size)] * self.slices
        if gathered:
            yield traverse(2 * tokens * columns, size)

    def _expand_rows(self, width: int, tokens: int, *, everyone: bool) -> Iterator[Product]:
        size, entries = self.size, tokens * self.whole
        yield Product(flops=0.0, bytes=(2 * size + _INDEX) * entries)
        yield traverse(3 * entries, size)
        yield Product(
            flops=2.0 * entries * width,
            bytes=size * (entries * (width + 1) + tokens * width) + _INDEX * entries,
        )
        if not everyone:
            yield traverse(2 * tokens * width, size)
        yield traverse(3 * tokens * width, size)
        if not everyone:
            yield traverse(2 * tokens * width, size)

    def _expand_matrices(self, counts: Sequence[int], *, gathered: bool) -> Iterator[Product]:
        size, tokens = self.size, sum(counts)
        if gathered:
            yield traverse(2 * tokens * self.slices * self.whole, size)
        for width in self.widths:
            apart = gathered or self.interleaved
            for count in counts:
                yield multiply(count, self.whole, width, size, adds=not apart)
            if apart:
                yield traverse(3 * tokens * width, size)

    def describe(self, counts: Sequence[int]) -> Iterator[Product]:
        """Small kernels that find what a batch's tokens read, once in a step."""
        few, _ = self._split(counts)
        number = _PLAN + (_BAGS * (self.slices + 1) if few else 0)
        yield from [traverse(2 * sum(counts), _INDEX)] * number


def _grouped(shape: ModelShape, linear: Linear, load: AdapterLoad, tp: int, size: int) -> _Grouped:
    factors = local_factors(linear, load, tp)
    column, exchanges = linear.blocked == "B", load.layout is Layout.SLORA
    return _Grouped(
        inputs=factors[0][1],
        widths=tuple(b_rows for _, _, b_rows, _ in factors),
        interleaved=linear.name == "linear_qkv" and shape.num_kv_heads > tp,
        rank=factors[0][0],
        whole=factors[0][0] * (tp if exchanges and column else 1),
        exchanges=exchanges,
        size=size,
    )
