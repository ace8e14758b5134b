"""How layouts compare as the link gets slower, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdlora_megatron import drawing
from bdlora_megatron.bench.plan import Setting, Variant
from bdlora_megatron.bench.report import BenchReport, quartiles, ratios
from bdlora_megatron.config import Layout

__all__ = ["figure_class", "plot_report"]

#: In a row.
_PANELS = 5


def figure_class() -> Any:
    """Matplotlib's figure, to be asked for before minutes of measuring are at stake.

    Raises:
        MissingDependencyError: It is not installed.
    """
    return drawing.figure_class("pip install 'bdlora-megatron[bench]', or leave --out away")


def plot_report(report: BenchReport, path: str | Path) -> Path:
    """Draw each contender's time over the base model's, with quartiles, by the link's latency.

    Args:
        report: What was measured; the first of its ranks is drawn.
        path: The picture; replaced if it exists.
    """
    plan = report.plan
    rank = plan.ranks[0]
    variants = {
        f"BD-LoRA, rank {2 * rank}": Variant(layout=Layout.BDLORA, rank=2 * rank),
        f"BD-LoRA, rank {4 * rank}": Variant(layout=Layout.BDLORA, rank=4 * rank),
        f"half-sharded, rank {rank}": Variant(layout=Layout.HALF_SHARDED, rank=rank),
        f"S-LoRA, rank {rank}": Variant(layout=Layout.SLORA, rank=rank),
    }
    if plan.bridge:
        variants[f"Megatron-Bridge, rank {rank}"] = Variant(rank=rank, bridge=True)
    steps: dict[str, list[Setting]] = {}
    for setting in plan.settings():
        steps.setdefault(setting.label, []).append(setting)
    rows = -(-len(steps) // _PANELS)
    columns = -(-len(steps) // rows)
    figure = figure_class()(figsize=(2.6 * columns + 1.0, 3.0 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes, (label, settings) in zip(panels, steps.items(), strict=False):
        _draw(axes, report, settings, variants)
        axes.set(title=label, xlabel="added link latency, ms")
    for axes in panels[len(steps) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("time over the base model's")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(variants),
        fontsize="small",
    )
    target = Path(path)
    figure.savefig(target, format="png", dpi=110)
    return target


def _draw(
    axes: Any, report: BenchReport, settings: Sequence[Setting], variants: Mapping[str, Variant]
) -> None:
    """One step's bars, link by link, with a line from quartile to quartile."""
    width = 0.8 / len(variants)
    for number, (name, variant) in enumerate(variants.items()):
        shift = width * (number - (len(variants) - 1) / 2)
        for place, setting in enumerate(settings):
            cell = report.find(variant, setting)
            if cell is None:
                continue
            low, middle, high = quartiles(ratios(cell, report.cell(Variant(), setting)))
            label = name if place == 0 else None
            axes.bar(place + shift, middle, width=width, color=f"C{number}", label=label)
            axes.vlines(place + shift, low, high, color="black", linewidth=1.0)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(settings)), [f"{1e3 * s.latency_s:g}" for s in settings])
