"""The layouts' times, and how well the cost model predicts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import quantiles
from typing import Any

from benchmarks.figures.statements import MissingStatementError, Statement, on_link

__all__ = ["STATEMENTS"]

_Step = tuple[str, int, int, int | None]
_STEP = ("phase", "batch", "length", "adapters")
_ARMS = {"base": "base", "bdlora": "bdlora 32", "half": "half_sharded 16"}
_ONE, _MANY = ("decode", 1, 128, None), ("mixed", 32, 128, 32)

_SPEED_ROW = (
    "| {base:.2f} | {bdlora:.2f} ({bdlora_low:.2f} to {bdlora_high:.2f}) | "
    "{half:.2f} ({half_low:.2f} to {half_high:.2f}) | 1 | |"
)


def _cells(report: Any, step: _Step, link_ms: float) -> dict[str, Any]:
    found = {
        cell["variant"]: cell
        for cell in report["cells"]
        if tuple(cell[key] for key in _STEP) == step and on_link(cell, link_ms)
    }
    if missing := {"slora 16", *_ARMS.values()} - set(found):
        raise MissingStatementError(
            f"layouts.json has no cells of {step} at {link_ms} ms for {missing}"
        )
    return found


def _speed(step: _Step, link_ms: float) -> Callable[[Any], Mapping[str, float]]:
    """How many times as fast as S-LoRA, round by round: the median and the quartiles."""

    def values(report: Any) -> Mapping[str, float]:
        cells = _cells(report, step, link_ms)
        made: dict[str, float] = {}
        for name, variant in _ARMS.items():
            rounds = zip(cells["slora 16"]["seconds"], cells[variant]["seconds"], strict=True)
            low, middle, high = quantiles([a / b for a, b in rounds], n=4, method="inclusive")
            made |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        return made

    return values


def _errors(cells: str) -> Callable[[Any], Mapping[str, float]]:
    """How far the cost model was from some of the cells; all but their number in per cent."""

    def values(report: Any) -> Mapping[str, float]:
        found = report["calibration"]["errors"][cells]
        return {name: value * (1 if name == "number" else 100) for name, value in found.items()}

    return values


def _readme() -> Iterator[Statement]:
    for start, step, link_ms in (
        (
            "| [decoding](benchmarks/results/layouts.md) 1 request, speed relative to S-LoRA",
            _ONE,
            0,
        ),
        ("| the same, 1 ms added to each collective", _ONE, 1),
        ("| decoding 32 requests, each with its own adapter", _MANY, 0),
    ):
        yield Statement(
            page="README.md",
            text=f"{start} {_SPEED_ROW}",
            report="layouts.json",
            values=_speed(step, link_ms),
        )


def _cost_model() -> Iterator[Statement]:
    for start, cells in (
        ("| sixth run, likewise", "held out"),
        ("| of the sixth, decoding", "of it, decode"),
        ("| mixed steps", "of it, mixed"),
        ("| prefill", "of it, prefill"),
        ("| training", "of it, train"),
    ):
        yield Statement(
            page="docs/cost-model.md",
            text=f"{start} | {{number:.0f}} | {{median:.1f}} % | {{high:.1f}} % "
            "| {largest:.1f} % | {within:.0f} % |",
            report="layouts.json",
            values=_errors(cells),
        )


#: What pages say of it.
STATEMENTS: Sequence[Statement] = (*_readme(), *_cost_model())
