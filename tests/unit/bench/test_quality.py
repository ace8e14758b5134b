"""How the quality benchmark chooses learning rates: one rule for every method."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.quality import LEARNING_RATES, WIDENINGS, Run, _finished, _plan, _search


def _finish(work, run, best):
    """A run whose development loss is the smaller, the nearer its learning rate is to ``best``."""
    record = {
        "num_blocks": run.num_blocks,
        "lora_rank": run.lora_rank,
        "lr": run.lr,
        "seed": run.seed,
        "full_fan_in": run.full_fan_in,
        "development_loss": abs(math.log(run.lr / best)),
    }
    (work / f"{run.name}.json").write_text(json.dumps(record), "utf-8")


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2e-3, {1e-3, 2e-3, 4e-3}),
        (1e-3, {5e-4, 1e-3, 2e-3, 4e-3}),
        (8e-3, {1e-3, 2e-3, 4e-3, 8e-3, 16e-3}),
    ],
)
def test_the_search_ends_when_the_best_rate_lies_between_others(tmp_path, best, tried):
    asked = set()
    for run in _search(tmp_path, 3, 16):
        asked.add(run.lr)
        _finish(tmp_path, run, best)
    assert asked == tried


def test_the_search_is_bounded(tmp_path):
    asked = set()
    for run in _search(tmp_path, 3, 16):
        asked.add(run.lr)
        _finish(tmp_path, run, 1.0)
    assert len(asked) == len(LEARNING_RATES) + WIDENINGS


def test_every_cell_is_run_at_its_own_rate(tmp_path):
    def rate(run):
        return 1e-3 * 2 ** (run.num_blocks % 2 + run.lora_rank // 32)

    for run in _plan(tmp_path):
        _finish(tmp_path, run, rate(run))
    for record in _finished(tmp_path):
        if record["seed"] != 0 or record["full_fan_in"]:
            run = Run(**{k: v for k, v in record.items() if k != "development_loss"})
            assert run.lr == rate(run)
