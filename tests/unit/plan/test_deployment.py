"""The plan of a deployment: consistent with its parts, and legible."""

from __future__ import annotations

import json

import pytest

from bdlora_megatron.blocks import matching_rank
from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import HARDWARE, PRESETS, AdapterLoad, Step, predict_step
from bdlora_megatron.plan.deployment import Deployment, make_plan, make_sweep


def _deployment(**changes):
    settings = {
        "model": "llama-3.1-8b",
        "shape": PRESETS["llama-3.1-8b"],
        "hardware": HARDWARE["a100-nvlink"],
        "tp": 8,
        "adapters": 32,
        "requests": 16,
    }
    return Deployment(**{**settings, **changes})


def test_plan_matches_parameters_and_parts():
    asked = _deployment()
    plan = make_plan(asked)
    blocked, half, slora = plan.layouts
    assert [p.layout for p in plan.layouts] == [Layout.BDLORA, Layout.HALF_SHARDED, Layout.SLORA]
    shapes = asked.shape.module_shapes()
    assert blocked.rank == matching_rank(shapes, lora_rank=16, num_blocks=8)
    assert blocked.memory.adapter <= slora.memory.adapter < half.memory.adapter
    # A step of 16 requests cannot use more than 16 of the 32 adapters.
    load = AdapterLoad(layout=Layout.SLORA, rank=16, distinct=16)
    step = Step(tokens=16, context=1024)
    assert slora.decode == predict_step(asked.shape, step, asked.hardware, 8, load)
    assert slora.prefill.base_compute == plan.base_prefill.base_compute
    fastest = min((half, slora), key=lambda p: p.decode.total)
    assert plan.unconverted is fastest.layout


def test_plan_is_told_in_words_and_in_json():
    plan = make_plan(_deployment())
    text = plan.table()
    assert "num_blocks=8, rank=32" in text
    assert "predictions of a model" in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert [layout["layout"] for layout in data["layouts"]] == ["bdlora", "half_sharded", "slora"]
    assert data["layouts"][0]["memory"]["adapter"] == plan.layouts[0].memory.adapter


def test_adapters_of_attention_alone_are_matched_and_predicted():
    targets = ("linear_qkv", "linear_proj")
    asked = _deployment(target_modules=targets)
    plan, whole = make_plan(asked), make_plan(_deployment())
    shapes = asked.shape.module_shapes(targets)
    assert plan.layouts[0].rank == matching_rank(shapes, lora_rank=16, num_blocks=8)
    load = AdapterLoad(layout=Layout.SLORA, rank=16, distinct=16, target_modules=targets)
    step = Step(tokens=16, context=1024)
    slora, of_all = plan.layouts[2], whole.layouts[2]
    assert slora.decode == predict_step(asked.shape, step, asked.hardware, 8, load)
    assert 0 < slora.memory.adapter < of_all.memory.adapter
    assert 0 < slora.train.adapter_communication < of_all.train.adapter_communication
    assert slora.train.optimizer < of_all.train.optimizer
    assert plan.base_decode == whole.base_decode
    assert "on linear_qkv, linear_proj\n" in plan.table()


def test_a_sweep_is_the_plans_of_its_numbers_in_one_table():
    sweep = make_sweep(_deployment(), (64, 1, 8, 8))
    plans = [make_plan(_deployment(requests=number)) for number in (1, 8, 64)]
    assert list(sweep.plans) == plans
    table, rest = sweep.table().split("\n\nllama", 1)
    assert f"llama{rest}" == plans[-1].table()
    rows = [line.split() for line in table.splitlines()[-3:]]
    for row, plan, adapters in zip(rows, plans, (1, 8, 32), strict=True):
        times = [plan.base_decode, *(layout.decode for layout in plan.layouts)]
        told = [str(plan.deployment.requests), str(adapters)]
        assert row[:6] == [*told, *(f"{1e3 * time.total:.2f}" for time in times)]
        assert row[7] == plan.unconverted.value
    assert json.loads(json.dumps(sweep.to_dict()))["plans"][0]["deployment"]["requests"] == 1
    with pytest.raises(ConfigError, match="one number at least"):
        make_sweep(_deployment(), ())


def test_a_model_that_does_not_fit_is_said():
    plan = make_plan(_deployment(shape=PRESETS["llama-3.1-70b"], tp=1))
    assert "do not leave room" in plan.table()


def test_impossible_numbers_are_listed():
    with pytest.raises(ConfigError, match="adapters=0, context=-1"):
        make_plan(_deployment(adapters=0, context=-1))
