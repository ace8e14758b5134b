"""What Megatron-Core's own layers run without fused kernels, operation by operation.

`bdlora bench` builds a model of Megatron-Core's local specification, where each line of Python is a
kernel or several: on a CPU, and on a GPU without Transformer Engine. ``work`` counts a server's
fused kernels instead. What this adds to it can be large: a decoding step with the static cache
rotates the cached keys anew, all of them, and attention writes its scores to memory.

Letters: b sequences, s new tokens of each, T = b s tokens. Heads and features are a rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bdlora_megatron.models.shape import Linear, ModelShape
from bdlora_megatron.plan.work import Product, multiply, traverse

__all__ = [
    "LocalStep",
    "local_backward",
    "local_forward",
    "local_loss",
    "local_loss_backward",
    "local_outer",
]

# Elements that a kernel reads and writes, in units of its tensor, kernel by kernel.
_NORM = (2, 1, 2, 2)
_NORM_BACKWARD = (2, 3, 2, 1, 1, 2, 2, 3, 3)
_ROTATE = (2, 1, 2, 2, 3, 2)
_ROTATE_BACKWARD = (2, 1, 2, 2, 3, 1, 3)
_SWIGLU = (2, 2, 3)
_SWIGLU_BACKWARD = (3, 3, 3, 4)
_SCORES_BACKWARD = (3, 1, 2, 2, 2, 2, 2)
_LOSS = (1, 2, 2, 1, 2)
# Kernels on a number for each token, or on a table of angles.
_NORM_SMALL, _NORM_BACKWARD_SMALL, _ROTATE_SMALL = 2, 3, 4
_EMBEDDING_SMALL, _LOSS_SMALL, _LOSS_BACKWARD_SMALL = 6, 14, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalStep:
    """One forward pass of whole sequences, or of what follows cached ones.

    Attributes:
        sequences: b.
        new: s.
        cached: Positions before them, in a static cache.
        bytes_per_element: Of weights, activations and cache.
        caches: Keys and values are written to a cache.
        sequence_parallel: Norms and residuals see their rank's tokens only.
    """

    sequences: int
    new: int
    cached: int = 0
    bytes_per_element: int = 4
    caches: bool = True
    sequence_parallel: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.new

    @property
    def positions(self) -> int:
        """What each sequence's tokens attend to."""
        return self.cached + self.new

    def own_tokens(self, tp: int) -> float:
        """Tokens that a rank's norms and residual additions see."""
        return self.tokens / (tp if self.sequence_parallel else 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """Sizes of attention on one rank, in elements."""

    queries: float
    keys: float
    values: float
    scores: float
    head_dim: int
    repeated: bool


def _attention(shape: ModelShape, at: LocalStep, tp: int) -> _Attention:
    heads, kv_heads = shape.num_heads // tp, shape.num_kv_heads // tp
    cached = at.sequences * at.positions * shape.head_dim
    return _Attention(
        queries=at.tokens * heads * shape.head_dim,
        keys=cached * kv_heads,
        values=cached * heads,
        scores=at.tokens * at.positions * heads,
        head_dim=shape.head_dim,
        repeated=heads != kv_heads,
    )


def local_forward(shape: ModelShape, at: LocalStep, tp: int) -> list[Product]:
    """Kernels of one decoder layer on one rank."""
    size, own = at.bytes_per_element, at.own_tokens(tp) * shape.hidden_size
    qkv, proj, fc1, fc2 = shape.linears()
    gate = at.tokens * shape.ffn_size // tp
    return [
        *_norm(own, at, size),
        _product(qkv, at, tp),
        *_attend(_attention(shape, at, tp), at, size),
        _product(proj, at, tp),
        traverse(3 * own, size),
        *_norm(own, at, size),
        _product(fc1, at, tp),
        *_passes(_SWIGLU, gate, size),
        _product(fc2, at, tp),
        traverse(3 * own, size),
    ]


def local_backward(shape: ModelShape, at: LocalStep, tp: int) -> list[Product]:
    """Kernels of one decoder layer's backward pass on one rank, its weights frozen."""
    size, own = at.bytes_per_element, at.own_tokens(tp) * shape.hidden_size
    gate = at.tokens * shape.ffn_size // tp
    residual = traverse(3 * own, size)
    return [
        *(_product(linear, at, tp) for linear in shape.linears()),
        *_passes(_SWIGLU_BACKWARD, gate, size),
        *_attend_backward(_attention(shape, at, tp), at, size),
        *_norm_backward(own, at, size),
        *_norm_backward(own, at, size),
        residual,
        residual,
    ]


def local_outer(shape: ModelShape, at: LocalStep, tp: int, *, rows: int) -> list[Product]:
    """Kernels of the embedding, the final norm and the output layer, forward."""
    size, hidden = at.bytes_per_element, at.tokens * shape.hidden_size
    vocabulary = -(-shape.vocab_size // tp)
    return [
        *[traverse(2 * at.tokens, size)] * _EMBEDDING_SMALL,
        # The looked-up rows, and zeros where another rank has a token's row.
        traverse(2 * hidden, size),
        traverse(2 * hidden, size),
        *_norm(at.own_tokens(tp) * shape.hidden_size, at, size),
        multiply(rows, shape.hidden_size, vocabulary, size),
    ]


def local_loss(shape: ModelShape, at: LocalStep, tp: int) -> list[Product]:
    """Kernels of the loss over all tokens."""
    size, logits = at.bytes_per_element, at.tokens * -(-shape.vocab_size // tp)
    return [*_passes(_LOSS, logits, size), *[traverse(2 * at.tokens, size)] * _LOSS_SMALL]


def local_loss_backward(shape: ModelShape, at: LocalStep, tp: int) -> list[Product]:
    """Kernels of the loss's gradient, down to the last decoder layer."""
    size, vocabulary = at.bytes_per_element, -(-shape.vocab_size // tp)
    return [
        *[traverse(2 * at.tokens, size)] * _LOSS_BACKWARD_SMALL,
        traverse(2 * at.tokens * vocabulary, size),
        multiply(at.tokens, vocabulary, shape.hidden_size, size),
        *_norm_backward(at.own_tokens(tp) * shape.hidden_size, at, size),
    ]


def _product(linear: Linear, at: LocalStep, tp: int) -> Product:
    """A layer's product; that of its input's gradient reads and writes as much."""
    in_local, out_local = linear.local_sizes(tp)
    return multiply(at.tokens, in_local, out_local, at.bytes_per_element)


def _passes(units: tuple[int, ...], elements: float, size: int) -> Iterator[Product]:
    for unit in units:
        yield traverse(unit * elements, size)


def _norm(elements: float, at: LocalStep, size: int) -> Iterator[Product]:
    yield from _passes(_NORM, elements, size)
    yield from [traverse(2 * at.tokens, size)] * _NORM_SMALL


def _norm_backward(elements: float, at: LocalStep, size: int) -> Iterator[Product]:
    yield from _passes(_NORM_BACKWARD, elements, size)
    yield from [traverse(2 * at.tokens, size)] * _NORM_BACKWARD_SMALL


def _attend(sizes: _Attention, at: LocalStep, size: int) -> Iterator[Product]:
    if at.caches:
        new = sizes.keys * at.new / at.positions
        yield from (traverse(2 * new, size), traverse(2 * new, size))
    for elements in (sizes.queries, sizes.keys):
        yield from [traverse(2 * at.positions * sizes.head_dim, size)] * _ROTATE_SMALL
        yield from _passes(_ROTATE, elements, size)
    if sizes.repeated:
        # Keys and values once for each of the query heads that share them.
        yield from [traverse(sizes.keys + sizes.values, size)] * 2
    flops = 2.0 * sizes.scores * sizes.head_dim
    yield Product(flops=flops, bytes=size * (sizes.queries + sizes.values + 2 * sizes.scores))
    # Mask and softmax.
    yield from _passes((2, 2), sizes.scores, size)
    yield Product(flops=flops, bytes=size * (sizes.scores + sizes.values + sizes.queries))
    if at.new > 1:
        yield traverse(2 * sizes.queries, size)


def _attend_backward(sizes: _Attention, at: LocalStep, size: int) -> Iterator[Product]:
    flops = 2.0 * sizes.scores * sizes.head_dim
    product = Product(flops=flops, bytes=size * (sizes.scores + sizes.queries + sizes.values))
    yield from [product] * 4
    yield from _passes(_SCORES_BACKWARD, sizes.scores, size)
    # The scale, on the gradients of queries and keys.
    yield traverse(2 * sizes.queries, size)
    yield traverse(2 * sizes.values, size)
    for elements in (sizes.queries, sizes.keys):
        yield from _passes(_ROTATE_BACKWARD, elements, size)
    if sizes.repeated:
        yield from [traverse(sizes.keys + sizes.values, size)] * 2
    # Gradients of queries, keys and values, side by side.
    yield traverse(2 * (sizes.queries + 2 * sizes.keys), size)
