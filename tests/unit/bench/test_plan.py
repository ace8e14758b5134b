"""What a run consists of, and the runs that are refused."""

from __future__ import annotations

import pytest

from bdlora_megatron.bench.plan import BenchPlan
from bdlora_megatron.errors import ConfigError
from tests.unit.bench.cells import small_plan


def test_ranks_are_paired_as_the_paper_pairs_them():
    labels = [variant.label for variant in small_plan().variants()]
    assert labels == ["base", "bdlora 32", "bdlora 64", "half_sharded 16", "slora 16"]
    two = [variant.label for variant in small_plan(ranks=(16, 32)).variants()]
    assert two.count("bdlora 64") == 1, "4 x 16 and 2 x 32 are one contender"
    assert len(two) == 1 + 4 + 4 - 1


def test_bridge_stands_beside_the_layouts_where_it_is_asked_for():
    labels = [variant.label for variant in small_plan(bridge=True).variants()]
    assert labels == ["base", "bdlora 32", "bdlora 64", "half_sharded 16", "slora 16", "bridge 16"]


def test_every_step_runs_on_every_link():
    plan = small_plan()
    settings = plan.settings()
    assert len(settings) == len(set(settings)) == 5 * 2
    assert {s.label for s in settings if s.latency_s == 1e-3} == {
        "decode 1 x 128",
        "decode 8 x 128",
        "prefill 1 x 64",
        "prefill 1 x 256",
        "train 1 x 64",
    }


def test_mixed_steps_have_as_many_adapters_as_requests_at_most():
    plan = small_plan(decode=(), mixed=((4, 16), (8, 16)), adapters=(1, 8), bridge=True)
    mixed = [setting for setting in plan.settings() if setting.adapters]
    assert [setting.label for setting in mixed[:3]] == [
        "mixed 4 x 16, U = 1",
        "mixed 8 x 16, U = 1",
        "mixed 8 x 16, U = 8",
    ]
    assert len({setting.step for setting in plan.settings()}) == 3 + 3
    assert all(setting.decodes for setting in mixed)
    # Bridge's layers hold one adapter.
    assert {variant.label for at, variant in plan.pairs() if at.adapters} == {
        variant.label for variant in plan.variants() if not variant.bridge
    }
    assert len(list(plan.pairs())) == 6 * len(plan.variants()) * 2 - 3 * 2


def test_layers_can_be_cut():
    assert BenchPlan(model="llama-3.1-8b", layers=2).shape.num_layers == 2
    assert BenchPlan(model="llama-3.1-8b").shape.num_layers == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "huge"}, "model='huge'; known models: small, llama-3.1-8b"),
        ({"tp": 1}, "from two ranks on"),
        ({"tp": 5, "ranks": (5,)}, "tp=5 does not divide 12 heads"),
        ({"repeats": 0}, "repeats and layers must be at least 1"),
        ({"layers": 0}, "at least 1"),
        ({"decode": ((0, 8),)}, r"steps of \[\(0, 8\)\]"),
        ({"decode": (), "prefill": (), "train": ()}, "steps of no size"),
        ({"mixed": ((4, 16),), "adapters": (1, 8)}, r"adapters=\(1, 8\) in mixed steps of 4"),
        ({"mixed": ((4, 16),), "adapters": (0,)}, "wanted some numbers from 1 to 4"),
        ({"mixed": ((4, 16),), "adapters": ()}, "wanted some numbers"),
        ({"latencies_s": (0.0, -1.0)}, "none negative"),
        ({"latencies_s": ()}, "at least one"),
        ({"ranks": (16, 3)}, r"ranks \[3\] with tp=2"),
        ({"ranks": ()}, "ranks none"),
        ({"target_modules": ("linear_fc3",)}, "linear_fc3; wanted one or more of linear_qkv"),
    ],
    ids=str,
)
def test_impossible_runs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_plan(**changes)
