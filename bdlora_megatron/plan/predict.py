"""Step times from counts and a machine's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.plan.assembled import assemble
from bdlora_megatron.plan.hardware import Hardware
from bdlora_megatron.plan.local import LocalStep, local_forward, local_outer
from bdlora_megatron.plan.work import (
    AdapterLoad,
    Message,
    Product,
    Step,
    Work,
    adapter_work,
    base_layer_work,
    exchanged,
    multiply,
    traverse,
)

__all__ = ["StepTime", "local_work", "outer_products", "predict_step", "work_seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One step, in seconds, by what it is spent on.

    Attributes:
        base_compute: Kernels of the base model.
        base_communication: Its collectives.
        adapter_compute: Kernels of the adapters.
        adapter_communication: Collectives of their layout.
        optimizer: The adapter's optimizer, in a training step.
    """

    base_compute: float
    base_communication: float
    adapter_compute: float = 0.0
    adapter_communication: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing is taken to overlap."""
        return (
            self.base_compute
            + self.base_communication
            + self.adapter_compute
            + self.adapter_communication
            + self.optimizer
        )


def work_seconds(
    work: Work, hardware: Hardware, tp: int, *, backward: bool = False
) -> tuple[float, float]:
    """Time of the kernels and time of the collectives of some work on one rank.

    Args:
        work: What the rank does.
        hardware: The machine.
        tp: Ranks.
        backward: The kernels belong to a backward pass or an optimizer.
    """
    device = hardware.device
    compute = sum(
        device.seconds(product.flops, product.bytes, panel=product.panel, backward=backward)
        for product in work.products
    )
    sent = sum(hardware.link.seconds(m.kind, m.payload_bytes, tp) for m in work.messages)
    return compute, sent


def predict_step(
    shape: ModelShape, step: Step, hardware: Hardware, tp: int, load: AdapterLoad | None = None
) -> StepTime:
    """How long one forward pass of the whole model takes.

    Args:
        shape: The base model.
        step: The batch.
        hardware: The machine.
        tp: Tensor-parallel ranks.
        load: The adapters; none for the base model alone.

    Returns:
        The time by what it is spent on. Input pipeline, sampling and scheduling are left out.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide.
    """
    layers = shape.num_layers
    base = work_seconds(base_layer_work(shape, step, tp), hardware, tp)
    outer = work_seconds(_outer_work(shape, step, tp), hardware, tp)
    added = (0.0, 0.0)
    if load is not None:
        added = work_seconds(adapter_work(shape, step, load, tp), hardware, tp)
    return StepTime(
        base_compute=layers * base[0] + outer[0],
        base_communication=layers * base[1] + outer[1],
        adapter_compute=layers * added[0],
        adapter_communication=layers * added[1],
    )


def local_work(shape: ModelShape, at: LocalStep, tp: int, load: AdapterLoad | None = None) -> Work:
    """One forward pass of the whole model in Megatron-Core's local layers, one adapter in them.

    Args:
        shape: The base model.
        at: The batch.
        tp: Tensor-parallel ranks.
        load: The adapter of all tokens; none for the base model alone.

    Returns:
        Every kernel and every collective of one rank.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide.
    """
    shape.check_tp(tp)
    size, tokens = at.bytes_per_element, at.tokens
    layer = local_forward(shape, at, tp)
    reduced = Message(kind="all_reduce", payload_bytes=size * tokens * shape.hidden_size)
    sent = [reduced, reduced] if tp > 1 else []
    for linear in () if load is None else load.linears(shape):
        assert load is not None
        adapter = assemble(shape, linear, load, tp, size=size)
        layer += adapter.forward(tokens)
        sent += exchanged(linear, size * tokens, load, adapter.shrunk, tp)
    # One row of logits for each sequence.
    rows = at.sequences
    outer = local_outer(shape, at, tp, rows=rows)
    ends = _outer_messages(shape, tokens, size, rows, tp)
    return Work(
        products=(*shape.num_layers * layer, *outer),
        messages=(*shape.num_layers * sent, *ends),
    )


def _outer_work(shape: ModelShape, step: Step, tp: int) -> Work:
    """Embedding, final norm and output layer.

    Only the last token of a prompt needs logits; a decoding step needs one row for each token.
    """
    rows = step.tokens if step.reads_cache else 1
    return Work(
        products=outer_products(shape, step, tp, rows=rows),
        messages=_outer_messages(shape, step.tokens, step.bytes_per_element, rows, tp),
    )


def outer_products(shape: ModelShape, step: Step, tp: int, *, rows: int) -> tuple[Product, ...]:
    """Kernels of embedding, final norm and output layer, forward."""
    size, hidden = step.bytes_per_element, shape.hidden_size
    small = traverse(2 * step.tokens * hidden, size)
    return small, small, multiply(rows, hidden, -(-shape.vocab_size // tp), size)


def _outer_messages(
    shape: ModelShape, tokens: int, size: int, rows: int, tp: int
) -> tuple[Message, ...]:
    if tp == 1:
        return ()
    vocabulary = -(-shape.vocab_size // tp)
    return (
        Message(kind="all_reduce", payload_bytes=size * tokens * shape.hidden_size),
        Message(kind="all_gather", payload_bytes=size * rows * vocabulary * tp),
    )
