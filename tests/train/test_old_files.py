"""What commit 5ae9907 wrote is still read: formats, a training checkpoint, an export.

The files in tests/fixtures/5ae9907 were written there: by `write_adapter` with the arguments below,
and by a training run of two steps on the files of `tests.train.runs`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bdlora_megatron.convert import ModuleKey, detect_format, read_adapter
from bdlora_megatron.train.loop import ADAPTER
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.train.runs import make_files, settings, train_rank
from tests.unit.convert.random_adapters import adapter, assert_same, factors

OLD = Path(__file__).parents[1] / "fixtures" / "5ae9907"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PEFT = {"bdlora": {"num_blocks": 2, "rank": 2, "target_modules": ["linear_proj"]}}


@pytest.mark.parametrize("name", ["peft", "megatron", "bridge", "slora"])
def test_adapters_of_every_format_are_read(name):
    modules = {}
    for layer in range(2):
        for module in ATTENTION:
            key = ModuleKey(layer=layer, name=module)
            modules[key] = factors(module, kv_heads=8, rank=2, scale=1.5, seed=len(modules))
    assert detect_format(OLD / name) == name
    assert_same(read_adapter(OLD / name), adapter(modules, kv_heads=8, layers=2))


def _config(root, save, steps):
    return settings(
        root,
        save,
        peft=PEFT,
        train={"train_iters": steps, "global_batch_size": 4, "micro_batch_size": 2},
        scheduler={"lr_decay_iters": 8},
        dataset={"train": str(root / "train.jsonl"), "too_long": "truncate"},
    )


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """As the run that this version makes from the start, at the same steps."""
    root = make_files(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    facts = run / "step_00000002" / "run.json"
    told = facts.read_text("utf-8").replace("/data/", f"{root}/").replace("/runs/old", str(run))
    facts.write_text(told, "utf-8")
    run_ranks(1, train_rank, _config(root, run, 4))
    run_ranks(1, train_rank, _config(root, tmp_path / "whole", 4))
    for name in ("run", "whole"):
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == [1, 2, 3, 4]
    resumed, whole = (
        load_file(tmp_path / name / ADAPTER / "adapter_model.safetensors")
        for name in ("run", "whole")
    )
    assert resumed.keys() == whole.keys()
    for name, factor in whole.items():
        assert_close(resumed[name], factor.double(), name)


def test_an_export_is_read():
    exported = read_adapter(OLD / "run" / "adapter")
    assert {factor.num_blocks for factor in exported.modules.values()} == {2}
    assert {factor.scale for factor in exported.modules.values()} == {2.0}
    assert all(torch.isfinite(factor.B).all() for factor in exported.modules.values())
