"""What lies in each rank's memory, and how many adapters fit beside the model."""

from __future__ import annotations

from dataclasses import dataclass

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.models.shape import ModelShape
from bdlora_megatron.plan.hardware import Device
from bdlora_megatron.plan.work import AdapterLoad, factor_sizes

__all__ = ["MemoryPlan", "adapter_bytes", "memory_plan"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on one rank.

    Attributes:
        weights: The base model's share.
        cache: Keys and values of ``context`` positions for each of ``requests``.
        adapter: One adapter's share.
        free: Left for adapters once a tenth of the device is kept for activations and the system.
        adapters_that_fit: How many adapters the free bytes hold at once.
    """

    weights: int
    cache: int
    adapter: int
    free: int
    adapters_that_fit: int


def adapter_bytes(shape: ModelShape, load: AdapterLoad, tp: int, *, bytes_per_element: int) -> int:
    """One adapter's bytes on one rank, all decoder layers.

    Args:
        shape: The base model.
        load: Layout, rank and blocks.
        tp: Tensor-parallel ranks.
        bytes_per_element: Of the factors.

    Returns:
        Bytes.

    Raises:
        ConfigError: The blocks do not fit the ranks, or the blocks the rank.
    """
    elements = 0
    for linear in load.linears(shape):
        a_sizes, b_sizes, _ = factor_sizes(linear, load, tp)
        elements += sum(a_sizes) + sum(b_sizes)
    return shape.num_layers * elements * bytes_per_element


def memory_plan(
    shape: ModelShape,
    load: AdapterLoad,
    device: Device,
    tp: int,
    *,
    requests: int,
    context: int,
    bytes_per_element: int = 2,
) -> MemoryPlan:
    """Lay out one rank's memory.

    Args:
        shape: The base model.
        load: What one adapter looks like.
        device: Whose memory.
        tp: Tensor-parallel ranks.
        requests: Requests that run at once.
        context: Positions kept for each.
        bytes_per_element: Of weights, cache and factors.

    Returns:
        The plan; no adapter fits if the model itself does not.

    Raises:
        ConfigError: Layers, blocks and ranks do not divide, or a number is not positive.
    """
    if requests < 1 or context < 1 or bytes_per_element < 1:
        raise ConfigError(
            f"requests={requests}, context={context}, bytes_per_element={bytes_per_element}; all "
            "must be positive"
        )
    shape.check_tp(tp)
    weights = shape.num_parameters() * bytes_per_element // tp
    position = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * bytes_per_element // tp
    cache = requests * context * position
    adapter = adapter_bytes(shape, load, tp, bytes_per_element=bytes_per_element)
    free = max(0, int(0.9 * device.memory) - weights - cache)
    return MemoryPlan(
        weights=weights,
        cache=cache,
        adapter=adapter,
        free=free,
        adapters_that_fit=free // adapter,
    )
