"""One adapter as training multiplies it, kernel by kernel.

A layer of `layers.adapters` holds a pair of factors for each of its projections. In each step it
puts the A one below the other, and multiplies each B by itself. Where a rank's rows alternate
between projections, it lays the B out in one matrix instead, in the layer's own row order with
zeros where other projections' columns stand, and multiplies the zeros too. Serving from slots does
neither (see ``work``). `bdlora bench` and training run what is counted here.

Letters: T tokens, I and O the layer's local sizes, K the rank over all projections, as wide as
``expand`` sees it. One scale of 1 is taken; another adds a pass over two small matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bdlora_megatron.config import Layout
from bdlora_megatron.models.shape import Linear, ModelShape
from bdlora_megatron.plan.work import AdapterLoad, Product, local_factors, multiply, traverse

__all__ = ["Assembled", "assemble"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """One layer's adapter on one rank.

    Attributes:
        layout: How ranks hold it.
        column: The layer is column-parallel.
        projections: Rows and columns of each A, then of each B, as stored.
        interleaved: The layer's rows alternate between its projections, head by head.
        in_local: I.
        shrunk: Rows of all A on this rank.
        rank: K.
        size: Bytes of an element.
    """

    layout: Layout
    column: bool
    projections: tuple[tuple[int, int, int, int], ...]
    interleaved: bool
    in_local: int
    shrunk: int
    rank: int
    size: int

    @property
    def expanded(self) -> int:
        """O: the rows of the assembled B."""
        return sum(b_rows for _, _, b_rows, _ in self.projections)

    def forward(self, tokens: int) -> Iterator[Product]:
        """Kernels beside the base product's.

        Yields:
            Putting A together, shrinking, putting B together, expanding.
        """
        T, K, O, size = tokens, self.rank, self.expanded, self.size
        many = len(self.projections) > 1
        if many:
            yield traverse(2 * self.shrunk * self.in_local, size)
        yield multiply(T, self.in_local, self.shrunk, size)
        if self.layout is Layout.SLORA and self.column:
            # The transpose that is gathered.
            yield traverse(2 * T * self.shrunk, size)
        if self.interleaved:
            if many:
                for _, _, b_rows, b_columns in self.projections:
                    yield traverse(b_rows * (b_columns + K), size)
                yield traverse(2 * O * K, size)
            yield multiply(T, K, O, size, adds=True)
            return
        if self.layout is Layout.SLORA and many:
            # The ranks' columns, one projection's after another's.
            for _, _, _, b_columns in self.projections:
                yield traverse(2 * T * b_columns, size)
            yield traverse(2 * T * K, size)
        for _, _, b_rows, b_columns in self.projections:
            yield multiply(T, b_columns, b_rows, size, adds=True)

    def backward(self, tokens: int) -> Iterator[Product]:
        """Kernels of the gradients of X, A and B."""
        T, K, O, size = tokens, self.rank, self.expanded, self.size
        many = len(self.projections) > 1
        # The gradient at the rank, to which every B adds.
        yield traverse(T * K, size)
        blocks = [(O, K)] if self.interleaved else [sizes[2:] for sizes in self.projections]
        for b_rows, b_columns in blocks:
            yield multiply(T, b_rows, b_columns, size, adds=True)
            yield multiply(b_rows, T, b_columns, size)
        if self.interleaved and many:
            for _, _, b_rows, b_columns in self.projections:
                yield traverse(2 * b_rows * K, size)
                yield traverse(b_rows * (K + b_columns), size)
        elif self.layout is Layout.SLORA and many:
            yield traverse(2 * T * K, size)
        yield multiply(self.shrunk, T, self.in_local, size)
        yield multiply(T, self.shrunk, self.in_local, size)
        # The base product's gradient of X and the adapter's.
        yield traverse(3 * T * self.in_local, size)

    def parameters(self) -> Iterator[int]:
        """Elements of each factor on this rank."""
        for rows, a_columns, b_rows, b_columns in self.projections:
            yield rows * a_columns
            yield b_rows * b_columns


def assemble(
    shape: ModelShape, linear: Linear, load: AdapterLoad, tp: int, *, size: int
) -> Assembled:
    """One layer's adapter on one rank.

    Args:
        shape: The model.
        linear: The layer.
        load: The adapter; its blocks are the ranks' number.
        tp: P.
        size: Bytes of an element.

    Raises:
        ConfigError: The blocks do not fit the ranks, or the blocks the rank.
    """
    factors = local_factors(linear, load, tp)
    column = linear.blocked == "B"
    in_local, _ = linear.local_sizes(tp)
    rank = sum(b_columns for _, _, _, b_columns in factors) if column else factors[0][3]
    return Assembled(
        layout=load.layout,
        column=column,
        projections=tuple(factors),
        # One group of heads on a rank stands as its projections do, one after the other.
        interleaved=linear.name == "linear_qkv" and shape.num_kv_heads > tp,
        in_local=in_local,
        shrunk=sum(rows for rows, _, _, _ in factors),
        rank=rank,
        size=size,
    )
