"""The errors of a compression as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bdlora_megatron.drawing import figure_class

__all__ = ["plot_errors"]


def plot_errors(
    adapters: Mapping[str, Sequence[float]], projections: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Draw the errors of adapters in rising order, and their spread in each projection, as PNG.

    Args:
        adapters: The errors of each kind of adapters.
        projections: The errors in each projection.
        path: The picture.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, errors in adapters.items():
        if errors:
            left.plot(sorted(errors), marker=".", label=f"{kind} ({len(errors)})")
            left.legend(fontsize="small")
    left.set(xlabel="adapters, by their error", ylabel="relative error (Frobenius)")
    if projections:
        right.boxplot(list(projections.values()), whis=(0, 100))
        right.set_xticks(range(1, len(projections) + 1), list(projections), rotation=30, ha="right")
    right.set_title("modules of all layers: median, quartiles, range", fontsize="medium")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, format="png", dpi=150)
