"""One adapter as training multiplies it, kernel by kernel: its factors laid out as one matrix.

A layer of `layers.adapters` holds a pair of factors for each of its projections. Before each step
it puts them together: the A one below the other, the B in the layer's own row order with zeros
where other projections' columns stand. The zeros are multiplied too. Serving from slots does
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
        out_local: Of the base product.
        shrunk: Rows of all A on this rank.
        rank: K.
        size: Bytes of an element.
    """

    layout: Layout
    column: bool
    projections: tuple[tuple[int, int, int, int], ...]
    interleaved: bool
    in_local: int
    out_local: int
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
        if many:
            for _, _, b_rows, b_columns in self.projections:
                yield traverse(b_rows * (b_columns + K), size)
            yield traverse(2 * O * K, size)
        yield multiply(T, K, O, size, adds=True)
        if self.layout is Layout.SLORA and not self.column:
            # Into its slice of the base product.
            yield traverse(2 * T * O, size)

    def backward(self, tokens: int) -> Iterator[Product]:
        """Kernels of the gradients of X, A and B."""
        T, K, O, size = tokens, self.rank, self.expanded, self.size
        if self.layout is Layout.SLORA and not self.column:
            yield from self._slice_backward(T)
        yield multiply(T, O, K, size)
        yield multiply(O, T, K, size)
        if len(self.projections) > 1:
            for _, _, b_rows, b_columns in self.projections:
                if self.interleaved:
                    yield traverse(2 * b_rows * K, size)
                yield traverse(b_rows * (K + b_columns), size)
        yield multiply(self.shrunk, T, self.in_local, size)
        yield multiply(T, self.shrunk, self.in_local, size)
        # The base product's gradient of X and the adapter's.
        yield traverse(3 * T * self.in_local, size)

    def _slice_backward(self, tokens: int) -> Iterator[Product]:
        """Autograd's copies of a gradient whose slice was written in place."""
        whole, own, size = tokens * self.out_local, tokens * self.expanded, self.size
        for elements in (whole, 2 * whole, 2 * whole, 2 * own, own, 2 * own, own + whole):
            yield traverse(elements, size)
        yield traverse(3 * whole, size)

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
    in_local, out_local = linear.local_sizes(tp)
    rank = sum(b_columns for _, _, _, b_columns in factors) if column else factors[0][3]
    return Assembled(
        layout=load.layout,
        column=column,
        projections=tuple(factors),
        # One group of heads on a rank stands as its projections do, one after the other.
        interleaved=linear.name == "linear_qkv" and shape.num_kv_heads > tp,
        in_local=in_local,
        out_local=out_local,
        shrunk=sum(rows for rows, _, _, _ in factors),
        rank=rank,
        size=size,
    )
