"""What one rank computes and sends in a training step: exact counts, and a prediction of its time.

Forward, backward and AdamW over the adapter, on one micro-batch. The base model's weights are
frozen, so that backward forms its input's gradients only; nothing is recomputed. As in every layer
but the first, the first layer's input is taken to want a gradient. Letters are those of ``work``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.plan.assembled import Assembled, assemble
from bdlora_megatron.plan.hardware import Hardware
from bdlora_megatron.plan.local import (
    LocalStep,
    local_backward,
    local_forward,
    local_loss,
    local_loss_backward,
    local_outer,
)
from bdlora_megatron.plan.predict import StepTime, outer_products, work_seconds
from bdlora_megatron.plan.work import (
    AdapterLoad,
    Kind,
    Message,
    Product,
    Step,
    Work,
    base_layer_work,
    exchanged,
    traverse,
)

__all__ = [
    "TrainStep",
    "adapter_training_work",
    "base_training_work",
    "optimizer_work",
    "outer_training_work",
    "predict_training",
    "training_work",
]

#: torch's AdamW, parameter by parameter: what each of its kernels reads and writes, in parameters.
_ADAMW = (2, 3, 2, 4, 2, 2, 2, 4)
#: A fused AdamW with fp32 copies: gradient, copy and two moments read, copy and moments written.
_FUSED_ADAMW_BYTES = 4 * 4 + 3 * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStep:
    """One micro-batch.

    Attributes:
        sequences: How many.
        length: Tokens of each.
        bytes_per_element: Of weights and activations.
        sequence_parallel: Norms and residuals are split over ranks along the sequence.
        fused: Kernels as Transformer Engine and a fused AdamW have them; else those of
            Megatron-Core's local layers and torch's AdamW.
    """

    sequences: int
    length: int
    bytes_per_element: int = 2
    sequence_parallel: bool = False
    fused: bool = True

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.length < 1:
            raise ConfigError(
                f"a training step of {self.sequences} sequences of {self.length} tokens; both must "
                "be positive"
            )

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length

    def local(self) -> LocalStep:
        """The same step for ``plan.local``."""
        return LocalStep(
            sequences=self.sequences,
            new=self.length,
            bytes_per_element=self.bytes_per_element,
            caches=False,
            sequence_parallel=self.sequence_parallel,
        )

    def forward(self) -> Step:
        """The same step for ``plan.work``; a token sees half of its sequence on average."""
        return Step(
            tokens=self.tokens,
            context=-(-self.length // 2),
            bytes_per_element=self.bytes_per_element,
            reads_cache=False,
        )


def base_training_work(shape: ModelShape, at: TrainStep, tp: int) -> tuple[Work, Work]:
    """One decoder layer of the base model, forward and backward.

    Returns:
        Its work forward, and its work backward. Where sequences are split, each of the four layers
        has one collective in either direction; else two have one all-reduce each.

    Raises:
        ConfigError: The layers do not divide by ``tp``.
    """
    shape.check_tp(tp)
    if at.fused:
        forward, backward = _fused(shape, at, tp)
    else:
        local = at.local()
        forward, backward = local_forward(shape, local, tp), local_backward(shape, local, tp)
    kinds: tuple[Kind, ...] = ("all_reduce",) * 2
    if at.sequence_parallel:
        # Columns gather forward and scatter backward, rows the other way round.
        kinds = ("all_gather", "reduce_scatter") * 2
    messages = _hidden(shape, at, tp, kinds)
    return (
        Work(products=tuple(forward), messages=messages),
        Work(products=tuple(backward), messages=messages),
    )


def _fused(shape: ModelShape, at: TrainStep, tp: int) -> tuple[list[Product], list[Product]]:
    """A server's kernels, and as many backward.

    A product's backward costs as much as itself, since the weights have no gradient; attention,
    which forms its scores again, two and a half times as many operations.
    """
    forward = list(base_layer_work(shape, at.forward(), tp).products)
    split = tp if at.sequence_parallel else 1
    products, attention, small = forward[:4], forward[4], forward[5:]
    small = [Product(flops=p.flops, bytes=p.bytes / split) for p in small]
    again = Product(flops=2.5 * attention.flops, bytes=2.5 * attention.bytes)
    return [*products, attention, *small], [*products, again, *small]


def adapter_training_work(
    shape: ModelShape, at: TrainStep, load: AdapterLoad, tp: int
) -> tuple[Work, Work]:
    """What an adapter adds to one decoder layer.

    Args:
        shape: The base model.
        at: The micro-batch; all of its tokens use the one adapter.
        load: The adapter.
        tp: P.

    Raises:
        ConfigError: The blocks are not the ranks' number, or do not fit the rank.
    """
    shape.check_tp(tp)
    forward: list[Product] = []
    backward: list[Product] = []
    sent: list[Message] = []
    returned: list[Message] = []
    adapters = _assemble(shape, at, load, tp)
    for linear in load.linears(shape):
        adapter = adapters[linear.name]
        forward += adapter.forward(at.tokens)
        backward += adapter.backward(at.tokens)
        column_bytes = at.tokens * at.bytes_per_element
        sent += list(exchanged(linear, column_bytes, load, adapter.shrunk, tp))
        returned += list(_returned(adapter, at, load, tp))
    return (
        Work(products=tuple(forward), messages=tuple(sent)),
        Work(products=tuple(backward), messages=tuple(returned)),
    )


def _assemble(shape: ModelShape, at: TrainStep, load: AdapterLoad, tp: int) -> dict[str, Assembled]:
    if load.layout is Layout.BDLORA and load.num_blocks not in (None, tp):
        raise ConfigError(
            f"num_blocks={load.num_blocks} over {tp} ranks; a training step is counted for as many "
            "blocks as ranks"
        )
    size = at.bytes_per_element
    return {
        linear.name: assemble(shape, linear, load, tp, size=size) for linear in load.linears(shape)
    }


def _returned(adapter: Assembled, at: TrainStep, load: AdapterLoad, tp: int) -> Iterator[Message]:
    """What one layer's adapter sends backward."""
    size = at.bytes_per_element
    if tp == 1:
        return
    if load.layout is Layout.SLORA:
        kind: Kind = "reduce_scatter" if adapter.column else "all_reduce"
        yield Message(kind=kind, payload_bytes=size * at.tokens * adapter.rank)
    if load.layout is Layout.HALF_SHARDED:
        # The gradient of the factor that every rank holds whole.
        elements = (
            adapter.shrunk * adapter.in_local if adapter.column else adapter.rank * adapter.expanded
        )
        yield Message(kind="all_reduce", payload_bytes=size * elements)


def outer_training_work(shape: ModelShape, at: TrainStep, tp: int) -> tuple[Work, Work]:
    """Embedding, final norm, output layer and loss, forward and backward.

    Returns:
        Their work forward, with one collective of the hidden state at each end that splits it, and
        the loss's three all-reduces of a number for each token; and their work backward, which
        ends at the last decoder layer.

    Raises:
        ConfigError: The layers do not divide by ``tp``.
    """
    shape.check_tp(tp)
    local = at.local()
    if at.fused:
        embedded = outer_products(shape, at.forward(), tp, rows=at.tokens)
        logits = at.tokens * -(-shape.vocab_size // tp)
        # The loss is in fp32.
        forward = [*embedded, traverse(3 * logits, 4)]
        backward = [traverse(2 * logits, 4), *embedded[-1:]]
    else:
        forward = [
            *local_outer(shape, local, tp, rows=at.tokens),
            *local_loss(shape, local, tp),
        ]
        backward = local_loss_backward(shape, local, tp)
    split: tuple[Kind, ...] = ("all_reduce",)
    returned: tuple[Kind, ...] = ("all_reduce",)
    if at.sequence_parallel:
        split, returned = ("reduce_scatter", "all_gather"), ("reduce_scatter",)
    # The largest logit, the right one, the sum of the exponentials: in fp32 whatever the weights.
    number = Message(kind="all_reduce", payload_bytes=4 * at.tokens)
    loss = (number,) * 3 if tp > 1 else ()
    return (
        Work(products=tuple(forward), messages=(*_hidden(shape, at, tp, split), *loss)),
        Work(products=tuple(backward), messages=_hidden(shape, at, tp, returned)),
    )


def _hidden(
    shape: ModelShape, at: TrainStep, tp: int, kinds: tuple[Kind, ...]
) -> tuple[Message, ...]:
    payload = at.bytes_per_element * at.tokens * shape.hidden_size
    return tuple(Message(kind=kind, payload_bytes=payload) for kind in kinds) if tp > 1 else ()


def optimizer_work(shape: ModelShape, at: TrainStep, load: AdapterLoad, tp: int) -> Work:
    """AdamW over one decoder layer's factors on one rank.

    Args:
        shape: The base model.
        at: Says whether it is fused, and the factors' type.
        load: The adapter.
        tp: P.

    Returns:
        One kernel for all factors where it is fused, else torch's own for each.

    Raises:
        ConfigError: The blocks are not the ranks' number, or do not fit the rank.
    """
    adapters = _assemble(shape, at, load, tp).values()
    sizes = [elements for adapter in adapters for elements in adapter.parameters()]
    if at.fused:
        per_parameter = _FUSED_ADAMW_BYTES + at.bytes_per_element
        return Work(products=(traverse(sum(sizes), per_parameter),))
    size = at.bytes_per_element
    # The first kernel counts the steps.
    return Work(
        products=tuple(
            traverse(elements, size)
            for n in sizes
            for elements in (2.0, *(unit * n for unit in _ADAMW))
        )
    )


def training_work(
    shape: ModelShape, at: TrainStep, tp: int, load: AdapterLoad | None = None
) -> tuple[Work, Work]:
    """One training step of the whole model.

    Args:
        shape: The base model.
        at: The micro-batch, which is all of the step.
        tp: P.
        load: The adapter; none for the frozen base model's forward and backward alone.

    Returns:
        Every kernel and every collective of one rank: forward, then backward with the optimizer.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide.
    """
    pairs = [base_training_work(shape, at, tp)]
    if load is not None:
        pairs.append(adapter_training_work(shape, at, load, tp))
        pairs.append((Work(), optimizer_work(shape, at, load, tp)))
    there, back = (
        [work for pair in pairs for work in (pair[way],) * shape.num_layers] for way in (0, 1)
    )
    ends = outer_training_work(shape, at, tp)
    return _joined([*there, ends[0]]), _joined([*back, ends[1]])


def _joined(works: list[Work]) -> Work:
    return Work(
        products=tuple(product for work in works for product in work.products),
        messages=tuple(message for work in works for message in work.messages),
    )


def predict_training(
    shape: ModelShape,
    at: TrainStep,
    hardware: Hardware,
    tp: int,
    load: AdapterLoad | None = None,
) -> StepTime:
    """How long one training step takes.

    Args:
        shape: The base model.
        at: The micro-batch, which is all of the step.
        hardware: The machine.
        tp: P.
        load: The adapter; none for the frozen base model's forward and backward alone.

    Returns:
        The time by what it is spent on; nothing overlaps. Input pipeline, gradient norm and
        data-parallel reductions are left out.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide.
    """
    layers = shape.num_layers
    base = _both_ways(base_training_work(shape, at, tp), hardware, tp)
    outer = _both_ways(outer_training_work(shape, at, tp), hardware, tp)
    adapter, steps = (0.0, 0.0), 0.0
    if load is not None:
        adapter = _both_ways(adapter_training_work(shape, at, load, tp), hardware, tp)
        steps = work_seconds(optimizer_work(shape, at, load, tp), hardware, tp, backward=True)[0]
    return StepTime(
        base_compute=layers * base[0] + outer[0],
        base_communication=layers * base[1] + outer[1],
        adapter_compute=layers * adapter[0],
        adapter_communication=layers * adapter[1],
        optimizer=layers * steps,
    )


def _both_ways(works: tuple[Work, Work], hardware: Hardware, tp: int) -> tuple[float, float]:
    """Compute and communication of a forward and a backward pass."""
    there = work_seconds(works[0], hardware, tp)
    back = work_seconds(works[1], hardware, tp, backward=True)
    return there[0] + back[0], there[1] + back[1]
