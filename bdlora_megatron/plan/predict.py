"""Step times from counts and a machine's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.plan.hardware import Hardware
from bdlora_megatron.plan.model import ModelShape
from bdlora_megatron.plan.work import (
    AdapterLoad,
    Message,
    Product,
    Step,
    Work,
    adapter_work,
    base_layer_work,
)

__all__ = ["StepTime", "predict_step", "work_seconds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """One step, in seconds, by what it is spent on.

    Attributes:
        base_compute: Kernels of the base model.
        base_communication: Its collectives.
        adapter_compute: Kernels of the adapters.
        adapter_communication: Collectives of their layout.
    """

    base_compute: float
    base_communication: float
    adapter_compute: float = 0.0
    adapter_communication: float = 0.0

    @property
    def total(self) -> float:
        """All of it: nothing is taken to overlap."""
        return (
            self.base_compute
            + self.base_communication
            + self.adapter_compute
            + self.adapter_communication
        )


def work_seconds(work: Work, hardware: Hardware, tp: int) -> tuple[float, float]:
    """Time of the kernels and time of the collectives of some work on one rank.

    Args:
        work: What the rank does.
        hardware: The machine.
        tp: Ranks.

    Returns:
        Seconds of each.
    """
    device = hardware.device
    compute = sum(
        device.launch + max(product.flops / device.flops, product.bytes / device.bandwidth)
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


def _outer_work(shape: ModelShape, step: Step, tp: int) -> Work:
    """Embedding, final norm and output layer.

    Only the last token of a prompt needs logits; a decoding step needs one row for each token.
    """
    size, hidden = step.bytes_per_element, shape.hidden_size
    rows = step.tokens if step.reads_cache else 1
    vocabulary = -(-shape.vocab_size // tp)
    weights = vocabulary * hidden
    products = (
        Product(flops=0.0, bytes=2 * size * step.tokens * hidden),
        Product(flops=0.0, bytes=2 * size * step.tokens * hidden),
        Product(flops=2.0 * rows * weights, bytes=size * (weights + rows * (hidden + vocabulary))),
    )
    if tp == 1:
        return Work(products=products)
    embedded = Message(kind="all_reduce", payload_bytes=size * step.tokens * hidden)
    gathered = Message(kind="all_gather", payload_bytes=size * rows * vocabulary * tp)
    return Work(products=products, messages=(embedded, gathered))
