"""What a run found, as JSON for programs and as a page for people."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bdlora_megatron.bench.calibrate import Calibration, calibrate
from bdlora_megatron.bench.plan import BenchPlan, Setting, Variant
from bdlora_megatron.bench.run import Cell
from bdlora_megatron.config import Layout
from bdlora_megatron.convert.adapter.tables import format_bytes

__all__ = ["BenchReport", "machine", "quartiles", "ratios", "write_report"]

_PACKAGES = ("bdlora-megatron", "megatron-core", "torch")
#: In a table, for a step that a contender cannot take.
_NONE = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """A run.

    Attributes:
        plan: What was asked.
        cells: What was measured.
        calibration: The cost model's fit; None where it was not tried.
        command: What makes it again.
        seconds: How long it took.
        load: The machine's load average when it began: what else was running.
    """

    plan: BenchPlan
    cells: Sequence[Cell]
    calibration: Calibration | None
    command: str
    seconds: float
    load: float

    @classmethod
    def of(
        cls, plan: BenchPlan, cells: Sequence[Cell], *, command: str, seconds: float, load: float
    ) -> BenchReport:
        """The report of what was measured on this machine, with the cost model fitted to it."""
        gpu = torch.cuda.is_available()
        fit = calibrate(plan, cells, 2 if gpu else 4, cpu=not gpu)
        return cls(
            plan=plan, cells=cells, calibration=fit, command=command, seconds=seconds, load=load
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {
            "command": self.command,
            "machine": {**machine(), "load_before": self.load},
            "plan": asdict(self.plan),
            "cells": [
                {
                    **asdict(cell.setting),
                    "variant": cell.variant.label,
                    "collectives": cell.collectives,
                    "payload_bytes": cell.payload_bytes,
                    "seconds": cell.seconds,
                }
                for cell in self.cells
            ],
            "calibration": self._calibration(),
            "hardware": self._hardware(),
        }

    def _hardware(self) -> dict[str, Any] | None:
        """The fitted machine, as ``bdlora plan --hardware`` reads it."""
        if self.calibration is None:
            return None
        cpu, memory = _memory(self.plan.tp)
        return asdict(self.calibration.machine.hardware(0.0, cpu=cpu, memory=memory))

    def _calibration(self) -> dict[str, Any] | None:
        fit = self.calibration
        if fit is None:
            return None
        return {
            "machine": asdict(fit.machine),
            "errors": {name: asdict(found) for name, found in fit.errors().items()},
            "predicted": [
                {
                    **asdict(p.cell.setting),
                    "variant": p.cell.variant.label,
                    "seconds": p.seconds,
                    "held_out": p.held_out,
                }
                for p in fit.predicted
            ],
        }

    def markdown(self, picture: str | None = None) -> str:
        """The page, with a picture's name to show if there is one."""
        parts = [*self._about()]
        if picture is not None:
            parts += [f"![Each layout's time over the base model's]({picture})", ""]
        for rank in self.plan.ranks:
            parts += self._times(rank)
        parts += self._traffic()
        if self.calibration is not None:
            parts += _prediction(self.calibration)
        return "\n".join(parts) + "\n"

    def cell(self, variant: Variant, setting: Setting) -> Cell:
        """One of the cells.

        Raises:
            KeyError: It was not measured.
        """
        cell = self.find(variant, setting)
        if cell is None:
            raise KeyError((variant, setting))
        return cell

    def find(self, variant: Variant, setting: Setting) -> Cell | None:
        """The cell of a contender and a setting; None if it was not measured."""
        for cell in self.cells:
            if cell.variant == variant and cell.setting == setting:
                return cell
        return None

    def _about(self) -> Iterator[str]:
        plan, shape, here = self.plan, self.plan.shape, machine()
        beside = ", beside Megatron-Bridge" if plan.bridge else ""
        yield f"# Layouts timed on {plan.tp} ranks{beside}"
        yield ""
        yield f"Made by `{self.command}` in {self.seconds:.0f} s on {here['date']}."
        yield ""
        yield (
            f"- Machine: {here['processor']}; {here['cores']} cores; {here['accelerator']}; load "
            f"average before the run {self.load:.1f}."
        )
        yield f"- Versions: {', '.join(f'{k} {v}' for k, v in here['versions'].items())}."
        yield (
            f"- Model `{plan.model}`: {shape.num_layers} layers, hidden {shape.hidden_size}, MLP "
            f"{shape.ffn_size}, {shape.num_heads} heads, random weights, {here['dtype']}; "
            f"{plan.tp} tensor-parallel ranks with {here['backend']}, one thread each."
        )
        yield f"- Adapters on {', '.join(plan.target_modules)}."
        yield (
            f"- Each cell is the median of {plan.repeats} rounds, with the quartiles. In a round "
            "every setting and every contender is visited once, in a random order. A time is the "
            "slowest rank's."
        )
        yield (
            "- In a `mixed` step the requests take U adapters in turn, from slots, as a server "
            "runs them; describing the batch is part of the step. In the other steps all use the "
            "one that is in the layers."
        )
        yield (
            "- `link` is a wait that was added before every collective, on every rank: ranks of "
            "one machine have no real link between them."
        )
        yield (
            "- `2r / S-LoRA` is how many times as fast BD-LoRA of twice the rank is as S-LoRA, "
            "round by round: the median, with the quartiles."
        )
        yield ""

    def _times(self, rank: int) -> Iterator[str]:
        variants = {
            "base": Variant(),
            f"BD-LoRA 2r = {2 * rank}": Variant(layout=Layout.BDLORA, rank=2 * rank),
            f"BD-LoRA 4r = {4 * rank}": Variant(layout=Layout.BDLORA, rank=4 * rank),
            f"half-sharded {rank}": Variant(layout=Layout.HALF_SHARDED, rank=rank),
            f"S-LoRA {rank}": Variant(layout=Layout.SLORA, rank=rank),
        }
        if self.plan.bridge:
            variants[f"Megatron-Bridge {rank}"] = Variant(rank=rank, bridge=True)
        yield f"## Milliseconds, r = {rank}"
        yield ""
        yield f"| step | link | {' | '.join(variants)} | 2r / S-LoRA | 4r / S-LoRA |"
        yield "|---" * (len(variants) + 4) + "|"
        for setting in self.plan.settings():
            times = [_milliseconds(self.find(variant, setting)) for variant in variants.values()]
            slow = self.cell(Variant(layout=Layout.SLORA, rank=rank), setting)
            gains = [
                _spread(ratios(slow, self.cell(variant, setting)), digits=2)
                for variant in variants.values()
                if variant.layout is Layout.BDLORA
            ]
            row = [setting.label, f"{1e3 * setting.latency_s:g} ms", *times, *gains]
            yield f"| {' | '.join(row)} |"
        yield ""

    def _traffic(self) -> Iterator[str]:
        yield "## What a step communicates"
        yield ""
        variants = self.plan.variants()
        yield f"| step | {' | '.join(variant.label for variant in variants)} |"
        yield "|---" * (len(variants) + 1) + "|"
        first = self.plan.latencies_s[0]
        for setting in self.plan.settings():
            if setting.latency_s == first:
                row = [_traffic(self.find(variant, setting)) for variant in variants]
                yield f"| {setting.label} | {' | '.join(row)} |"
        yield ""
        yield "Collectives of one step, and the bytes of the whole tensors that they carry."
        yield ""


def write_report(report: BenchReport, stem: Path) -> Path:
    """Write the JSON, the picture and the page.

    Raises:
        MissingDependencyError: Matplotlib is not installed.
    """
    # The picture is drawn from the report.
    from bdlora_megatron.bench.plot import plot_report

    stem.parent.mkdir(parents=True, exist_ok=True)
    picture = plot_report(report, f"{stem}.png")
    Path(f"{stem}.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    page = Path(f"{stem}.md")
    page.write_text(report.markdown(picture.name), "utf-8")
    return page


def _milliseconds(cell: Cell | None) -> str:
    return _NONE if cell is None else _spread([1e3 * second for second in cell.seconds])


def _traffic(cell: Cell | None) -> str:
    if cell is None:
        return _NONE
    kinds = {"all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS"}
    counts = [f"{n} {kinds.get(kind, kind)}" for kind, n in sorted(cell.collectives.items())]
    return f"{', '.join(counts)}; {format_bytes(cell.payload_bytes)}"


def _prediction(fit: Calibration) -> Iterator[str]:
    numbers = fit.machine
    yield "## What the cost model makes of it"
    yield ""
    yield (
        "`bdlora_megatron.plan` was given seven numbers of this machine, fitted to half of the "
        "settings, and predicted the others: "
        f"{numbers.flops / 1e9:.3g} GFLOP/s and {numbers.bandwidth / 1e9:.3g} GB/s for each rank, "
        f"{1e6 * numbers.launch:.3g} microseconds for each kernel (Python included), "
        f"{1e6 * numbers.backward:.3g} for one of a backward pass or an optimizer, "
        f"{1e6 * numbers.start:.3g} for each collective, {numbers.link / 1e9:.3g} GB/s between "
        f"ranks, and {1e6 * numbers.timer:.3g} microseconds that an added wait takes beyond its "
        "length."
    )
    yield ""
    yield "| cells | number | median error | 90th percentile | largest | within 25 % |"
    yield "|---|---|---|---|---|---|"
    for name, found in fit.errors().items():
        yield (
            f"| {name} | {found.number} | {found.median:.1%} | {found.high:.1%} | "
            f"{found.largest:.1%} | {found.within:.0%} |"
        )
    yield ""
    yield "| held-out step | link | contender | measured ms | predicted ms | error |"
    yield "|---|---|---|---|---|---|"
    for p in fit.predicted:
        if p.held_out:
            at, measured = p.cell.setting, median(p.cell.seconds)
            yield (
                f"| {at.label} | {1e3 * at.latency_s:g} ms | {p.cell.variant.label} | "
                f"{1e3 * measured:.2f} | {1e3 * p.seconds:.2f} | {p.error:+.0%} |"
            )


def ratios(slow: Cell, fast: Cell) -> list[float]:
    """One cell's time over another's, round by round."""
    return [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _spread(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine() -> dict[str, Any]:
    """The hardware and the versions that a report has to name."""
    gpu = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(_cores()),
        "accelerator": torch.cuda.get_device_name() if gpu else "no accelerator",
        "backend": "NCCL" if gpu else "gloo",
        "dtype": "bfloat16" if gpu else "float32",
        "versions": {"Python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
    }


def _memory(tp: int) -> tuple[bool, float]:
    """Whether ranks run on CPUs, and the bytes of memory of each."""
    if torch.cuda.is_available():
        return False, float(torch.cuda.get_device_properties(0).total_memory)
    return True, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / tp


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(1))
