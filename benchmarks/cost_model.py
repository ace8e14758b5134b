"""The cost model's tables for machines we do not have, and its distance to the paper's figures.

Run: `python -m benchmarks.cost_model`. Writes benchmarks/results/cost_model.md; no measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bdlora_megatron.config import Layout
from bdlora_megatron.plan import HARDWARE, PRESETS, AdapterLoad, ModelShape, Step, predict_step
from bdlora_megatron.plan.hardware import Hardware
from bdlora_megatron.plan.predict import StepTime

OUT = Path(__file__).parent / "results" / "cost_model.md"
RANKS, BATCHES, CONTEXT = (16, 32, 64, 128), (1, 8, 32, 64), 1024
#: End to end on eight A100s, "up to", at twice and at four times S-LoRA's rank: arXiv 2510.23346,
#: abstract; which ranks were paired follows from the published parameter ratios.
PUBLISHED = {"llama-3.1-70b": (1.79, 1.23), "llama-3.1-8b": (1.63, 1.30)}


def main() -> None:
    """Write the report."""
    title = "# Predictions of the cost model"
    parts = [title, "", _about(), "", *_speedups(), "", *_against_paper(), ""]
    OUT.write_text("\n".join(parts), "utf-8")
    print(OUT)


def _about() -> str:
    sources = "\n".join(
        f"- `{hardware.name}`: {hardware.source}." for hardware in HARDWARE.values()
    )
    return (
        "Made by `python -m benchmarks.cost_model`: predictions, not measurements. One decoding "
        f"step, bf16, context {CONTEXT}, every request with an adapter of its own. A GPU is taken "
        "to reach 70 % of its multiplication peak, 80 % of its memory's, and to start a kernel in "
        f"3 microseconds; nothing overlaps.\n\n{sources}"
    )


def _step(
    shape: ModelShape, batch: int, hardware: Hardware, tp: int, layout: Layout, rank: int
) -> StepTime:
    load = AdapterLoad(layout=layout, rank=rank, distinct=batch)
    return predict_step(shape, Step(tokens=batch, context=CONTEXT), hardware, tp, load)


def _speedups() -> Iterator[str]:
    yield "## BD-LoRA of twice the rank over S-LoRA, decoding"
    yield ""
    yield "| model | machine | TP | " + " | ".join(f"batch {b}" for b in BATCHES) + " |"
    yield "|---|---|---|" + "---|" * len(BATCHES)
    for model, shape in PRESETS.items():
        for hardware in HARDWARE.values():
            for tp in (2, 4, 8):
                cells = []
                for batch in BATCHES:
                    slora = _step(shape, batch, hardware, tp, Layout.SLORA, 16)
                    ours = _step(shape, batch, hardware, tp, Layout.BDLORA, 32)
                    cells.append(f"{slora.total / ours.total:.2f}")
                yield f"| {model} | {hardware.name} | {tp} | {' | '.join(cells)} |"


def _against_paper() -> Iterator[str]:
    yield "## Against the paper's figures, eight A100s with NVLink"
    yield ""
    yield (
        "`predicted` is the largest over batches and ranks, as the paper's is `up to`. The last "
        "column is how long one of S-LoRA's collectives would have to take, at batch 1 and rank "
        "16, for the model to give the published figure; the model itself takes the time in the "
        "column before."
    )
    yield ""
    yield "| model | rank | published | predicted | model's us per collective | implied us |"
    yield "|---|---|---|---|---|---|"
    hardware = HARDWARE["a100-nvlink"]
    for model, published in PUBLISHED.items():
        shape = PRESETS[model]
        for times, figure in zip((2, 4), published, strict=True):
            best = max(
                _step(shape, batch, hardware, 8, Layout.SLORA, rank).total
                / _step(shape, batch, hardware, 8, Layout.BDLORA, times * rank).total
                for batch in BATCHES
                for rank in RANKS
            )
            slora = _step(shape, 1, hardware, 8, Layout.SLORA, 16)
            ours = _step(shape, 1, hardware, 8, Layout.BDLORA, times * 16)
            calls = 4 * shape.num_layers
            rest = slora.total - slora.adapter_communication
            implied = (figure * ours.total - rest) / calls
            yield (
                f"| {model} | {times}r | {figure:.2f} | {best:.2f} | "
                f"{1e6 * slora.adapter_communication / calls:.1f} | {1e6 * implied:.1f} |"
            )


if __name__ == "__main__":
    main()
