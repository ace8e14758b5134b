"""The fit finds a machine again whose times it is shown, and predicts what it is not shown."""

from __future__ import annotations

import pytest

from bdlora_megatron.bench.calibrate import Machine, calibrate
from bdlora_megatron.config import Layout
from bdlora_megatron.plan import AdapterLoad, Step, predict_step
from tests.unit.bench.cells import make_cells, small_plan

TRUE = Machine(flops=2.1e10, bandwidth=3e9, launch=7e-5, start=3e-4, link=4e8, timer=3e-4)


def _true_seconds(plan):
    """What the cost model says of `TRUE`, with a link written out by hand."""

    def seconds(cell):
        at, arm = cell.setting, cell.arm
        if at.phase == "train":
            return [1.0] * 3
        decodes = at.phase == "decode"
        step = Step(
            tokens=at.batch if decodes else at.length,
            context=at.length if decodes else at.length // 2,
            bytes_per_element=4,
            reads_cache=decodes,
        )
        load = None if arm.layout is None else AdapterLoad(layout=arm.layout, rank=arm.rank)
        time = predict_step(plan.shape, step, TRUE.hardware(0.0), plan.tp, load).total
        # Embedding and logits, two in each layer; S-LoRA has four more in each.
        layers = plan.shape.num_layers
        calls = 2 + layers * (6 if arm.layout is Layout.SLORA else 2)
        wait = (1e-3 + TRUE.timer) * calls if at.latency_s else 0.0
        return [time + wait] * 3

    return seconds


def test_settings_that_were_held_out_are_predicted():
    plan = small_plan()
    fit = calibrate(plan, make_cells(plan, _true_seconds(plan)), 4)
    held_out = [p for p in fit.predicted if p.held_out]
    assert len(fit.predicted) == 2 * 4 * 5, "training steps are not predicted"
    assert len(held_out) == len(fit.predicted) / 2
    shown = {p.cell.setting for p in fit.predicted if not p.held_out}
    assert not shown & {p.cell.setting for p in held_out}
    assert fit.errors(held_out=True)[-1] < 0.05
    assert fit.errors(held_out=False)[-1] < 0.05
    assert fit.machine.flops == pytest.approx(TRUE.flops, rel=0.2)
    assert fit.machine.start == pytest.approx(TRUE.start, rel=0.3)


def test_a_machine_that_differs_is_not_predicted():
    """Held-out errors are real: settings that follow another law stay unpredicted."""
    plan = small_plan()
    # The fit sees a chessboard; these are the other squares' own steps.
    fitted = {s for s in plan.settings() if (s.batch * s.length in (128, 64)) == (not s.latency_s)}
    honest = _true_seconds(plan)

    def seconds(cell):
        return honest(cell) if cell.setting in fitted else [3 * s for s in honest(cell)]

    fit = calibrate(plan, make_cells(plan, seconds), 4)
    assert fit.errors(held_out=True)[-1] > 0.25


def test_too_little_to_hold_out():
    plan = small_plan(prefill=(), latencies_s=(0.0,))
    assert calibrate(plan, make_cells(plan, lambda cell: [1.0] * 3), 4) is None
