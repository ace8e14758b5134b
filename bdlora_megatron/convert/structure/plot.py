"""The error of a truncation against its rank, as a picture."""

from __future__ import annotations

from pathlib import Path

from bdlora_megatron.convert.structure.choices import Choices
from bdlora_megatron.drawing import figure_class

__all__ = ["plot_choices"]


def plot_choices(choices: Choices, path: str | Path) -> Path:
    """Draw relative error against total rank, with the choices marked, and write it as PNG.

    Args:
        choices: What `choices_for_tp` found.
        path: The picture; replaced if it exists.

    Returns:
        The path.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    figure = figure_class()(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    ranks, errors = zip(*choices.curve, strict=True)
    axes.plot(ranks, errors, color="black", linewidth=1.2, label="truncation")
    for number, choice in enumerate(choices.choices):
        chosen = choice.name == choices.recommended
        axes.plot(
            choice.rank,
            choice.error,
            linestyle="none",
            marker="o" if choice.layout.value == "bdlora" else "x",
            markersize=9 if chosen else 6,
            color=f"C{number}",
            label=f"{choice.name}{' (recommended)' if chosen else ''}",
        )
    axes.set(
        xlabel=f"total rank over {choices.tp} blocks",
        ylabel="relative error (Frobenius)",
        title=f"{choices.adapter} on {choices.tp} tensor-parallel ranks",
        ylim=(-0.03, None),
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    target = Path(path)
    figure.savefig(target, format="png", dpi=150)
    return target
