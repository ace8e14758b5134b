"""How layouts compare as the link gets slower, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bdlora_megatron.bench.plan import Arm
from bdlora_megatron.bench.report import BenchReport, quartiles, ratios
from bdlora_megatron.config import Layout
from bdlora_megatron.errors import MissingDependencyError

__all__ = ["figure_class", "plot_report"]


def figure_class() -> Any:
    """Matplotlib's figure, to be asked for before minutes of measuring are at stake.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        # The figure alone, without pyplot's windows and global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "drawing needs matplotlib, which is not installed; "
            "install the extra: pip install 'bdlora-megatron[plot]', or leave --out away"
        ) from error
    return Figure


def plot_report(report: BenchReport, path: str | Path) -> Path:
    """Draw each contender's time over the base model's, with quartiles, by the link's latency.

    Args:
        report: What was measured; the first of its ranks is drawn.
        path: The picture; replaced if it exists.

    Returns:
        The path.
    """
    plan = report.plan
    rank = plan.ranks[0]
    arms = {
        f"BD-LoRA, rank {2 * rank}": Arm(layout=Layout.BDLORA, rank=2 * rank),
        f"BD-LoRA, rank {4 * rank}": Arm(layout=Layout.BDLORA, rank=4 * rank),
        f"half-sharded, rank {rank}": Arm(layout=Layout.HALF_SHARDED, rank=rank),
        f"S-LoRA, rank {rank}": Arm(layout=Layout.SLORA, rank=rank),
    }
    if plan.bridge:
        arms[f"Megatron-Bridge, rank {rank}"] = Arm(rank=rank, bridge=True)
    width = 0.8 / len(arms)
    steps = list(dict.fromkeys(setting.label for setting in plan.settings()))
    figure = figure_class()(figsize=(2.6 * len(steps) + 1.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, steps, strict=True):
        settings = [setting for setting in plan.settings() if setting.label == label]
        places = range(len(settings))
        for number, (name, arm) in enumerate(arms.items()):
            low, middle, high = zip(
                *(
                    quartiles(ratios(report.cell(arm, setting), report.cell(Arm(), setting)))
                    for setting in settings
                ),
                strict=True,
            )
            shifted = [place + width * (number - (len(arms) - 1) / 2) for place in places]
            axes.bar(shifted, middle, width=width, label=name if axes is panels[0] else None)
            axes.vlines(shifted, low, high, color="black", linewidth=1.0)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(list(places), [f"{1e3 * s.latency_s:g}" for s in settings])
        axes.set(title=label, xlabel="added link latency, ms")
    panels[0].set_ylabel("time over the base model's")
    figure.legend(loc="outside lower center", ncols=len(arms), fontsize="small")
    target = Path(path)
    figure.savefig(target, format="png", dpi=110)
    return target
