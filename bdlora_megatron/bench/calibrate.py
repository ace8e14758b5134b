"""Fitting the cost model's machine to half of the settings, and predicting the other half.

The halves are a chessboard over steps and links: no step is seen on every link, and none on no
link, unless there is only one.

One machine has to explain all steps. Its only number for training alone is what a kernel of a
backward pass or an optimizer costs to start. The injected wait goes into the link's start-up time,
as it does in the measurement.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bdlora_megatron.bench.mixed_work import mixed_work
from bdlora_megatron.bench.plan import BenchPlan, Variant
from bdlora_megatron.bench.run import Cell
from bdlora_megatron.errors import MissingDependencyError
from bdlora_megatron.plan import AdapterLoad, Device, Hardware, Link, Protocol
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work
from bdlora_megatron.plan.training import TrainStep, training_work
from bdlora_megatron.plan.work import Message, Product, Work

__all__ = ["Calibration", "Errors", "Machine", "Predicted", "calibrate", "least_squares"]

#: Errors up to about ten per cent count by their square, larger ones linearly: a disturbed
#: measurement pulls little harder than any other.
_NEAR = 0.1
#: How far a number may move from its start: some settings leave one undetermined.
_REACH = math.log(100.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What is fitted, in SI units.

    Attributes:
        flops: Operations a second of one rank.
        bandwidth: Bytes a second of one rank's memory.
        launch: Seconds for each kernel of a forward pass, Python included.
        backward: Seconds for each kernel of a backward pass or an optimizer.
        start: Seconds for each collective.
        link: Bytes a second between ranks.
        timer: Seconds that an injected wait takes longer than it was told to.
    """

    flops: float = 5e10
    bandwidth: float = 8e9
    launch: float = 2e-5
    backward: float = 1e-5
    start: float = 1e-4
    link: float = 1e9
    timer: float = 1e-4

    def hardware(self, latency_s: float, *, cpu: bool, memory: float = 0.0) -> Hardware:
        """The cost model's machine, with a wait before each collective.

        Args:
            latency_s: The injected wait.
            cpu: As of ``Device``.
            memory: As of ``Device``.
        """
        wait = latency_s + self.timer if latency_s else 0.0
        ring = Protocol(base=self.start + wait, per_step=0.0, bandwidth=self.link)
        return Hardware(
            name="fitted",
            device=Device(
                flops=self.flops,
                bandwidth=self.bandwidth,
                memory=memory,
                launch=self.launch,
                backward_launch=self.backward,
                cpu=cpu,
            ),
            link=Link(protocols=(ring,)),
            source="fitted to a run of `bdlora bench`",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """One cell, measured and predicted.

    Attributes:
        cell: What was measured.
        seconds: What was predicted.
        held_out: The fit did not see its setting.
    """

    cell: Cell
    seconds: float
    held_out: bool

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.seconds / median(self.cell.seconds) - 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Sizes of relative errors.

    Attributes:
        number: How many there are.
        median: Half of them are smaller.
        high: The 90th percentile.
        largest: The largest.
        within: Share of those up to a quarter.
    """

    number: int
    median: float
    high: float
    largest: float
    within: float

    @classmethod
    def of(cls, predicted: Sequence[Predicted]) -> Errors:
        """What is to be said of some predictions, at least one."""
        errors = sorted(abs(p.error) for p in predicted)
        return cls(
            number=len(errors),
            median=median(errors),
            high=errors[min(int(0.9 * len(errors)), len(errors) - 1)],
            largest=errors[-1],
            within=sum(error <= 0.25 for error in errors) / len(errors),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A fit and what it predicts."""

    machine: Machine
    predicted: tuple[Predicted, ...]

    def errors(self) -> dict[str, Errors]:
        """The errors of what was fitted, of what was held out, and of that for each phase."""
        held_out = [p for p in self.predicted if p.held_out]
        groups = {"fitted": [p for p in self.predicted if not p.held_out], "held out": held_out}
        for phase in dict.fromkeys(p.cell.setting.phase for p in held_out):
            groups[f"of it, {phase}"] = [p for p in held_out if p.cell.setting.phase == phase]
        return {name: Errors.of(some) for name, some in groups.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """What one rank does in a step, equal kernels and equal messages together."""

    forward: Counter[Product]
    backward: Counter[Product]
    messages: Counter[Message]

    def seconds(self, hardware: Hardware, tp: int) -> float:
        """How long that takes."""
        spent = 0.0
        for kernels, backward in ((self.forward, False), (self.backward, True)):
            for kernel, number in kernels.items():
                spent += number * hardware.device.seconds(
                    kernel.flops, kernel.bytes, panel=kernel.panel, backward=backward
                )
        for message, number in self.messages.items():
            spent += number * hardware.link.seconds(message.kind, message.payload_bytes, tp)
        return spent


def calibrate(
    plan: BenchPlan, cells: Sequence[Cell], bytes_per_element: int, *, cpu: bool
) -> Calibration | None:
    """Fit to half of the settings and predict all.

    Args:
        plan: What was measured.
        cells: The measurements. Megatron-Bridge's layers, which the model does not count, are left
            out.
        bytes_per_element: Of weights and activations.
        cpu: As of ``Device``.

    Returns:
        The fit, or None where there are too few settings to hold any out.
    """
    cells = [cell for cell in cells if not cell.variant.bridge]
    steps = list(dict.fromkeys(cell.setting.label for cell in cells))
    if len(steps) * len(plan.latencies_s) < 4:
        return None
    fitted = {
        cell.setting
        for cell in cells
        if (steps.index(cell.setting.label) + plan.latencies_s.index(cell.setting.latency_s)) % 2
        == 0
    }
    # What a step does, the link's speed does not change.
    known: dict[tuple[object, Variant], _Counted] = {}
    for cell in cells:
        key = (cell.setting.step, cell.variant)
        if key not in known:
            known[key] = _count(plan, cell, bytes_per_element, fused=not cpu)

    def predict(cell: Cell, machine: Machine) -> float:
        hardware = machine.hardware(cell.setting.latency_s, cpu=cpu)
        return known[cell.setting.step, cell.variant].seconds(hardware, plan.tp)

    machine = _fit([cell for cell in cells if cell.setting in fitted], predict)
    return Calibration(
        machine=machine,
        predicted=tuple(
            Predicted(
                cell=cell, seconds=predict(cell, machine), held_out=cell.setting not in fitted
            )
            for cell in cells
        ),
    )


def _count(plan: BenchPlan, cell: Cell, size: int, *, fused: bool) -> _Counted:
    at, variant = cell.setting, cell.variant
    load = None
    if variant.layout is not None:
        load = AdapterLoad(
            layout=variant.layout,
            rank=variant.rank,
            distinct=at.adapters or 1,
            target_modules=plan.target_modules,
        )
    if at.phase == "train":
        step = TrainStep(sequences=at.batch, length=at.length, bytes_per_element=size, fused=False)
        there, back = training_work(plan.shape, step, plan.tp, load)
    else:
        local = LocalStep(
            sequences=at.batch,
            new=at.new,
            cached=at.cached,
            bytes_per_element=size,
        )
        if at.adapters is None:
            there, back = local_work(plan.shape, local, plan.tp, load), Work()
        else:
            there, back = mixed_work(plan.shape, local, plan.tp, load, fused=fused), Work()
    return _Counted(
        forward=Counter(there.products),
        backward=Counter(back.products),
        messages=Counter((*there.messages, *back.messages)),
    )


def least_squares() -> Any:
    """SciPy's robust least squares, looked up before minutes of measuring are at stake.

    Raises:
        MissingDependencyError: SciPy is not installed.
    """
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingDependencyError(
            f"fitting the cost model needs scipy ({error}); "
            "install the extra: pip install 'bdlora-megatron[bench]'"
        ) from error
    return optimize.least_squares


def _fit(cells: Sequence[Cell], predict: Callable[[Cell, Machine], float]) -> Machine:
    """The machine whose predictions are least wrong, by the logarithms of its numbers."""
    names = Machine.__slots__
    measured = [math.log(median(cell.seconds)) for cell in cells]
    start = [math.log(getattr(Machine(), name)) for name in names]

    def machine_at(point: Sequence[float]) -> Machine:
        return Machine(**{name: math.exp(x) for name, x in zip(names, point, strict=True)})

    def errors_at(point: Sequence[float]) -> list[float]:
        machine = machine_at(point)
        return [
            math.log(predict(cell, machine)) - known
            for cell, known in zip(cells, measured, strict=True)
        ]

    bounds = [x - _REACH for x in start], [x + _REACH for x in start]
    found = least_squares()(errors_at, start, bounds=bounds, loss="soft_l1", f_scale=_NEAR)
    return machine_at(found.x)
