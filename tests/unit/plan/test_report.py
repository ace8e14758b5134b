"""The plan of a deployment: consistent with its parts, and legible."""

from __future__ import annotations

import json

import pytest

from bdlora_megatron.blocks import matching_rank
from bdlora_megatron.config import Layout
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.plan import HARDWARE, PRESETS, AdapterLoad, Step, predict_step
from bdlora_megatron.plan.report import Deployment, make_plan


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


def test_a_model_that_does_not_fit_is_said():
    plan = make_plan(_deployment(shape=PRESETS["llama-3.1-70b"], tp=1))
    assert "do not leave room" in plan.table()


def test_impossible_numbers_are_listed():
    with pytest.raises(ConfigError, match="adapters=0, context=-1"):
        make_plan(_deployment(adapters=0, context=-1))
