"""How fast a machine multiplies, reads and sends: the parameters of the cost model.

A kernel takes `launch + max(flops / rate, bytes / bandwidth)`, the roofline; on a core of a CPU the
sum of the two instead of the larger. A collective takes the better of a link's protocols, each
`base + steps * per_step + bytes on the wire / bandwidth`. A ring of P ranks takes `2 (P - 1)` steps
for an all-reduce and `P - 1` for the others. NCCL tunes itself with the same formula.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bdlora_megatron.errors import ConfigError, nearest

__all__ = ["HARDWARE", "Device", "Hardware", "Link", "Protocol", "find_hardware"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator or processor.

    Attributes:
        flops: Floating-point operations a second that a large matrix product reaches.
        bandwidth: Bytes a second that a large copy reaches.
        memory: Bytes that models and caches may use.
        launch: Seconds before a kernel starts, what the model's Python does before it included.
        backward_launch: The same of a backward pass and an optimizer, before whose kernels no
            model's Python runs; as ``launch`` where unset.
        cpu: A core of a CPU. It does not multiply while it waits for memory, and a product of
            several rows first copies its second matrix into panels, which costs as much as reading
            it again.
    """

    flops: float
    bandwidth: float
    memory: float
    launch: float
    backward_launch: float | None = None
    cpu: bool = False

    def seconds(self, flops: float, moved: float, *, panel: float, backward: bool) -> float:
        """How long one kernel takes.

        Args:
            flops: Its operations.
            moved: Bytes that it reads and writes.
            panel: Of them, the second matrix of a product of several rows.
            backward: It belongs to a backward pass or an optimizer.

        Returns:
            Seconds.
        """
        launch = self.launch
        if backward and self.backward_launch is not None:
            launch = self.backward_launch
        if self.cpu:
            return launch + flops / self.flops + (moved + panel) / self.bandwidth
        return launch + max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way to run a collective.

    Attributes:
        base: Seconds, whatever the number of ranks.
        per_step: Seconds for each step of the ring.
        bandwidth: Bytes a second that a rank sends.
    """

    base: float
    per_step: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What connects the ranks.

    Attributes:
        protocols: The fastest for each message counts.
    """

    protocols: tuple[Protocol, ...]

    def seconds(self, kind: str, payload_bytes: float, tp: int) -> float:
        """How long one collective takes.

        Args:
            kind: ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
            payload_bytes: Size of the whole tensor.
            tp: Ranks.

        Returns:
            Seconds; 0 for one rank.
        """
        if tp == 1:
            return 0.0
        steps = (tp - 1) * (2 if kind == "all_reduce" else 1)
        wire = payload_bytes * steps / tp
        return min(p.base + steps * p.per_step + wire / p.bandwidth for p in self.protocols)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A machine.

    Attributes:
        name: What to call it.
        device: Each of its devices.
        link: What connects them.
        source: Where the numbers are from.
    """

    name: str
    device: Device
    link: Link
    source: str


def _gpu(peak_flops: float, peak_bandwidth: float, memory: float) -> Device:
    """A GPU that reaches 70 % of its multiplication peak and 80 % of its memory's.

    Both shares, and 3 microseconds for a kernel in a captured graph, are assumptions.
    """
    return Device(
        flops=0.7 * peak_flops, bandwidth=0.8 * peak_bandwidth, memory=memory, launch=3e-6
    )


def _nccl(low: tuple[float, float], simple: tuple[float, float], bandwidth: float) -> Link:
    """NCCL's low-latency ring, which sends at a quarter of the speed, and its plain one.

    Args:
        low: Base and per-step latency of LL, in microseconds.
        simple: The same of Simple.
        bandwidth: Bytes a second of the plain ring.
    """
    return Link(
        protocols=(
            Protocol(base=low[0] * 1e-6, per_step=low[1] * 1e-6, bandwidth=bandwidth / 4),
            Protocol(base=simple[0] * 1e-6, per_step=simple[1] * 1e-6, bandwidth=bandwidth),
        )
    )


_TUNING = (
    "latencies: NCCL's own tuning table, ring, LL and Simple (NVIDIA/nccl at 01afd20, "
    "src/graph/tuning.cc)"
)
_A100 = _gpu(312e12, 2.039e12, 80e9)
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="a100-nvlink",
            device=_A100,
            link=_nccl((3.6, 0.47), (8.4, 3.4), 200e9),
            source="NVIDIA A100 80GB SXM data sheet; 200 GB/s bus bandwidth measured by "
            f"NVIDIA/nccl-tests#149 and #178; {_TUNING}",
        ),
        Hardware(
            name="a100-pcie",
            device=_gpu(312e12, 1.935e12, 80e9),
            link=_nccl((3.6, 1.0), (8.4, 5.7), 20e9),
            source="NVIDIA A100 80GB PCIe data sheet; 20 GB/s bus bandwidth measured by "
            f"NVIDIA/nccl-tests#178 across PCIe; {_TUNING}",
        ),
        Hardware(
            name="h100-nvlink",
            device=_gpu(989e12, 3.35e12, 80e9),
            link=_nccl((3.6, 0.47), (8.4, 3.4), 370e9),
            source="NVIDIA H100 SXM data sheet; 370 GB/s bus bandwidth as NCCL's maintainer gives "
            f"it in NVIDIA/nccl-tests#212; {_TUNING}",
        ),
        Hardware(
            name="a100-multi-node",
            device=_A100,
            link=_nccl((3.6, 2.7), (8.4, 9.6), 20e9),
            source="one 200 Gb/s network port for each A100, four fifths of it used, every step "
            f"of the ring across the network; {_TUNING}",
        ),
    )
}


def find_hardware(name: str) -> Hardware:
    """A machine by its name in ``HARDWARE``, or the one fitted to a run of ``bdlora bench``.

    Args:
        name: The name, or the path of the JSON that ``bdlora bench --out`` wrote.

    Returns:
        The machine.

    Raises:
        ConfigError: It is neither, or the run had too few settings for a fit.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--hardware {name} is neither a file nor a machine that is known here; pass the JSON "
            f"of bdlora bench --out, or a name: {nearest(name, HARDWARE)}"
        )
    try:
        found = json.loads(path.read_text("utf-8"))["hardware"]
        protocols = tuple(Protocol(**protocol) for protocol in found["link"]["protocols"])
        return Hardware(
            name=path.name,
            device=Device(**found["device"]),
            link=Link(protocols=protocols),
            source=found["source"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no fitted machine ({type(error).__name__}: {error}); wanted the JSON "
            "that bdlora bench --out wrote, of a run of at least four settings: steps times "
            "--latency-ms"
        ) from error
