"""What one rank computes and sends in one decoder layer: exact counts, no times.

Letters: P tensor-parallel ranks, R an adapter's total rank, T tokens in the step, U distinct
adapters among them, I and O a projection's sizes over all ranks. Factors are held as
``layers.adapters`` holds them, so bytes and collectives here equal those of the real layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bdlora_megatron.config import DEFAULT_TARGETS, Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import Linear, ModelShape
from bdlora_megatron.plan.model import check_targets

__all__ = [
    "AdapterLoad",
    "Kind",
    "Message",
    "Product",
    "Step",
    "Work",
    "adapter_work",
    "base_layer_work",
    "exchanged",
    "factor_sizes",
    "local_factors",
    "multiply",
    "traverse",
]

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]

# Two norms, the rotary embedding, the cache's append, SwiGLU and two residual additions.
_SMALL_KERNELS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One forward pass of a batch.

    Attributes:
        tokens: Tokens in the batch: requests when decoding, prompt tokens when prefilling.
        context: Cached positions that each token attends to, on average.
        bytes_per_element: Of weights, activations and cache.
        reads_cache: Each token reads its own context from memory, as when decoding; a prompt's
            tokens share theirs.
    """

    tokens: int
    context: int
    bytes_per_element: int = 2
    reads_cache: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterLoad:
    """The adapters of a step.

    Attributes:
        layout: How ranks hold them.
        rank: R of each.
        distinct: U, how many different ones the step's tokens use.
        num_blocks: Blocks N of a block-diagonal one; the ranks' number when unset.
        target_modules: The layers that they change, of ``DEFAULT_TARGETS``.

    Raises:
        ConfigError: The layout or a layer is not known.
    """

    layout: Layout
    rank: int
    distinct: int = 1
    num_blocks: int | None = None
    target_modules: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", Layout(self.layout))
        check_targets(self.target_modules)

    def linears(self, shape: ModelShape) -> tuple[Linear, ...]:
        """The layers of one decoder layer that they change."""
        return shape.linears(self.target_modules)


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One kernel.

    Attributes:
        flops: Multiplications and additions.
        bytes: Read from and written to the device's memory.
        panel: Of them, the second matrix of a product of several rows; see ``Device.cpu``.
    """

    flops: float
    bytes: float
    panel: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One collective.

    Attributes:
        kind: As ``runtime.record_collectives`` names it.
        payload_bytes: Size of the whole tensor: reduced, gathered, or before scattering.
    """

    kind: Kind
    payload_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one rank does."""

    products: tuple[Product, ...] = ()
    messages: tuple[Message, ...] = ()


def multiply(
    rows: float, inner: float, columns: float, size: int, *, adds: bool = False
) -> Product:
    """The product of ``[rows, inner]`` and ``[inner, columns]``.

    Args:
        rows: As above.
        inner: As above.
        columns: As above.
        size: Bytes of an element.
        adds: To a third matrix, which is read too.

    Returns:
        The kernel; each matrix is read or written once.
    """
    written = rows * columns * (2 if adds else 1)
    return Product(
        flops=2.0 * rows * inner * columns,
        bytes=size * (rows * inner + inner * columns + written),
        panel=size * inner * columns if rows > 1 else 0.0,
    )


def traverse(elements: float, size: int) -> Product:
    """A kernel that moves ``elements`` of ``size`` bytes and multiplies next to nothing."""
    return Product(flops=0.0, bytes=size * elements)


def factor_sizes(linear: Linear, load: AdapterLoad, tp: int) -> tuple[list[int], list[int], int]:
    """One adapter's share on one rank, in elements as stored.

    Returns:
        The sizes of each projection's A, those of each projection's B, and the rows of all A on
        this rank, which is the width of what ``shrink`` makes.

    Raises:
        ConfigError: The blocks do not fit the ranks, or the blocks the rank.
    """
    factors = local_factors(linear, load, tp)
    a_sizes = [rows * a_columns for rows, a_columns, _, _ in factors]
    b_sizes = [b_rows * b_columns for _, _, b_rows, b_columns in factors]
    return a_sizes, b_sizes, sum(rows for rows, _, _, _ in factors)


def local_factors(linear: Linear, load: AdapterLoad, tp: int) -> list[tuple[int, int, int, int]]:
    """One adapter's factors on one rank, as stored.

    Returns:
        For each projection the rows and columns of A, then those of B.

    Raises:
        ConfigError: The blocks do not fit the ranks, or the blocks the rank.
    """
    blocks = load.num_blocks or tp
    if load.layout is Layout.BDLORA and (blocks % tp or load.rank % blocks):
        raise ConfigError(
            f"rank={load.rank} in {blocks} blocks over {tp} ranks; the blocks must be a multiple "
            "of the ranks and divide the rank"
        )
    if load.rank < 1:
        raise ConfigError(f"rank={load.rank}; a positive rank is needed")
    column = linear.blocked == "B"
    return [
        _local(linear.in_features, out_features, load, tp, blocks, column=column, replicas=replicas)
        for out_features, replicas in zip(linear.out_features, linear.replicas, strict=True)
    ]


def _local(
    I: int, O: int, load: AdapterLoad, tp: int, blocks: int, *, column: bool, replicas: int
) -> tuple[int, int, int, int]:
    """Local shapes of A ``[rows, columns]`` and B ``[rows, columns]``."""
    R = load.rank
    if load.layout is Layout.BDLORA:
        if column:
            # Where ranks share a head, each holds all of its blocks.
            return replicas * R // tp, I, O // tp, R // blocks
        return R // tp, I // blocks, O, R // tp
    if load.layout is Layout.HALF_SHARDED:
        return (R, I, O // tp, R) if column else (R, I // tp, O, R)
    # S-LoRA splits a column's A along the rank, which is rounded up to a multiple of P.
    padded = -(-R // tp) * tp
    return (padded // tp, I, O // tp, padded) if column else (padded, I // tp, O // tp, padded)


def adapter_work(shape: ModelShape, step: Step, load: AdapterLoad, tp: int) -> Work:
    """What adapters add to one decoder layer, forward.

    Args:
        shape: The base model.
        step: The batch; each of its tokens uses one adapter.
        load: The adapters.
        tp: P.

    Returns:
        Two products for each adapted layer, and the layout's own collectives.

    Raises:
        ConfigError: The blocks do not fit the ranks, or the blocks the rank.
    """
    shape.check_tp(tp)
    products: list[Product] = []
    messages: list[Message] = []
    for linear in load.linears(shape):
        a_sizes, b_sizes, width = factor_sizes(linear, load, tp)
        products += _shrink_expand(linear, step, load, (sum(a_sizes), sum(b_sizes), width), tp)
        messages += exchanged(linear, step.tokens * step.bytes_per_element, load, width, tp)
    return Work(products=tuple(products), messages=tuple(messages))


def _shrink_expand(
    linear: Linear, step: Step, load: AdapterLoad, sizes: tuple[int, int, int], tp: int
) -> Iterator[Product]:
    a_size, b_size, width = sizes
    column = linear.blocked == "B"
    split = 1 if column else tp
    in_local = linear.in_features // split
    out_local = sum(linear.out_features) // (tp if column else 1)
    if load.layout is Layout.SLORA:
        # What is exchanged is as wide on every rank as all ranks' shrunk rows together; a row
        # layer's product fills this rank's slice of the output only.
        width_in = width * tp if column else width
        out_local = sum(linear.out_features) // tp
    else:
        width_in = width
    size, tokens = step.bytes_per_element, step.tokens
    yield Product(
        flops=2.0 * tokens * a_size,
        bytes=size * (load.distinct * a_size + tokens * (in_local + width)),
    )
    # The expand adds into the base output: it reads and writes it.
    yield Product(
        flops=2.0 * tokens * b_size,
        bytes=size * (load.distinct * b_size + tokens * (width_in + 2 * out_local)),
    )


def exchanged(
    linear: Linear, column_bytes: int, load: AdapterLoad, width: int, tp: int
) -> Iterator[Message]:
    """What one layer's adapter sends between its two products, forward.

    Args:
        linear: The layer.
        column_bytes: Of one number of the rank, for all tokens.
        load: The adapter.
        width: Rows of all A on this rank.
        tp: P.

    Yields:
        One message for S-LoRA, none for the others.
    """
    if load.layout is not Layout.SLORA or tp == 1:
        return
    column = linear.blocked == "B"
    payload = column_bytes * width * (tp if column else 1)
    yield Message(kind="all_gather" if column else "all_reduce", payload_bytes=payload)


def base_layer_work(shape: ModelShape, step: Step, tp: int) -> Work:
    """What one decoder layer of the base model costs on one rank, forward.

    Args:
        shape: The base model.
        step: The batch.
        tp: P.

    Returns:
        Four products, attention, the small kernels, and two all-reduces of the hidden state.

    Raises:
        ConfigError: The layers do not divide by ``tp``.
    """
    shape.check_tp(tp)
    size, tokens, hidden = step.bytes_per_element, step.tokens, shape.hidden_size
    products = []
    for linear in shape.linears():
        in_local, out_local = linear.local_sizes(tp)
        products.append(multiply(tokens, in_local, out_local, size))
    products.append(_attention(shape, step, tp))
    products += [Product(flops=0.0, bytes=size * tokens * 2 * hidden)] * _SMALL_KERNELS
    reduced = Message(kind="all_reduce", payload_bytes=size * tokens * hidden)
    return Work(products=tuple(products), messages=(reduced, reduced) if tp > 1 else ())


def _attention(shape: ModelShape, step: Step, tp: int) -> Product:
    heads, kv_heads = shape.num_heads // tp, shape.num_kv_heads // tp
    readers = step.tokens if step.reads_cache else 1
    cache = 2 * readers * step.context * kv_heads * shape.head_dim
    own = step.tokens * (2 * heads + 2 * kv_heads) * shape.head_dim
    return Product(
        flops=4.0 * step.tokens * step.context * heads * shape.head_dim,
        bytes=step.bytes_per_element * (cache + own),
    )
