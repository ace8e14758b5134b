"""The fit finds a machine again whose times it is shown, and predicts what it is not shown."""

from __future__ import annotations

import pytest

from bdlora_megatron.bench.calibrate import Machine, calibrate
from bdlora_megatron.bench.mixed_work import mixed_work
from bdlora_megatron.config import Layout
from bdlora_megatron.plan import AdapterLoad, TrainStep, predict_training
from bdlora_megatron.plan.local import LocalStep
from bdlora_megatron.plan.predict import local_work, work_seconds
from tests.unit.bench.cells import make_cells, small_plan

TRUE = Machine(
    flops=2.1e10,
    bandwidth=3e9,
    launch=7e-5,
    backward=2e-5,
    start=3e-4,
    link=4e8,
    timer=3e-4,
)


def _true_seconds(plan):
    """What the cost model says of `TRUE`, with a link written out by hand."""

    def seconds(cell):
        at, variant = cell.setting, cell.variant
        hardware = TRUE.hardware(0.0, cpu=True)
        distinct = at.adapters or 1
        load = variant.layout and AdapterLoad(
            layout=variant.layout, rank=variant.rank, distinct=distinct
        )
        layers = plan.shape.num_layers
        if at.phase == "train":
            step = TrainStep(sequences=at.batch, length=at.length, bytes_per_element=4, fused=False)
            time = predict_training(plan.shape, step, hardware, plan.tp, load).total
            # Embedding, logits and loss, four in each layer; S-LoRA has eight more in each.
            more = {Layout.SLORA: 8, Layout.HALF_SHARDED: 4}.get(variant.layout, 0)
            calls = 5 + layers * (4 + more)
        else:
            step = LocalStep(
                sequences=at.batch,
                new=1 if at.decodes else at.length,
                cached=at.length if at.decodes else 0,
            )
            work = local_work(plan.shape, step, plan.tp, load)
            if at.adapters:
                work = mixed_work(plan.shape, step, plan.tp, load, fused=False)
            time = sum(work_seconds(work, hardware, plan.tp))
            # Embedding and logits, two in each layer; S-LoRA has four more in each.
            calls = 2 + layers * (6 if variant.layout is Layout.SLORA else 2)
        wait = (1e-3 + TRUE.timer) * calls if at.latency_s else 0.0
        return [time + wait] * 3

    return seconds


def test_settings_that_were_held_out_are_predicted():
    plan = small_plan(mixed=((8, 128),), adapters=(1, 2, 8))
    fit = calibrate(plan, make_cells(plan, _true_seconds(plan)), 4, cpu=True)
    held_out = [p for p in fit.predicted if p.held_out]
    assert len(fit.predicted) == 2 * 8 * 5
    assert len(held_out) == len(fit.predicted) / 2
    assert {p.cell.setting.phase for p in held_out} == {"decode", "mixed", "prefill", "train"}
    shown = {p.cell.setting for p in fit.predicted if not p.held_out}
    assert not shown & {p.cell.setting for p in held_out}
    # How far the search stops from the bottom.
    assert fit.errors()["held out"].largest < 1e-3
    assert fit.errors()["fitted"].largest < 1e-3
    for name in Machine.__slots__:
        assert getattr(fit.machine, name) == pytest.approx(getattr(TRUE, name), rel=0.02), name


def test_a_machine_that_differs_is_not_predicted():
    """Held-out errors are real: settings that follow another law stay unpredicted."""
    plan = small_plan()
    # The fit sees a chessboard: every other step of one link, and the others of the other.
    steps = list(dict.fromkeys(s.label for s in plan.settings()))
    fitted = {s for s in plan.settings() if (steps.index(s.label) % 2 == 0) == (not s.latency_s)}
    honest = _true_seconds(plan)

    def seconds(cell):
        return honest(cell) if cell.setting in fitted else [3 * s for s in honest(cell)]

    fit = calibrate(plan, make_cells(plan, seconds), 4, cpu=True)
    assert fit.errors()["held out"].largest > 0.25


def test_too_little_to_hold_out():
    plan = small_plan(prefill=(), latencies_s=(0.0,))
    assert calibrate(plan, make_cells(plan, lambda cell: [1.0] * 3), 4, cpu=True) is None


def test_bridges_layers_are_not_predicted():
    plan = small_plan(bridge=True)
    fit = calibrate(plan, make_cells(plan, lambda cell: [1.0] * 3), 4, cpu=True)
    assert {p.cell.variant.label for p in fit.predicted} == {
        variant.label for variant in small_plan().variants()
    }
