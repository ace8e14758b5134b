"""The plug in the real NeMo: `make test-nemo` makes an environment that has it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from bdlora_megatron.convert import read_adapter
from tests.hosts.logits import TRAINED, assert_same_adapter, peft_logits
from tests.hosts.nemo_run import TOKENS
from tests.tolerances import MODEL_BFLOAT16, assert_close

ROOT = Path(__file__).parents[2]


def has_nemo():
    try:
        return importlib.util.find_spec("nemo.collections.llm") is not None
    except ImportError:
        return False


pytestmark = [
    pytest.mark.skipif(
        not has_nemo(), reason="nemo-toolkit is not installed; make test-nemo installs it"
    ),
    pytest.mark.timeout(1800),
]


def call(*command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=env,
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def train(folder, name, ranks, *overrides, **settings):
    call(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", ranks),
        *("-m", "tests.hosts.nemo_run", folder, name, json.dumps(settings), *overrides),
    )
    return [
        torch.load(folder / f"{name}-{settings['steps']}-{rank}.pt", weights_only=False)
        for rank in range(ranks)
    ]


def last_checkpoint(folder, name):
    (found,) = (folder / name / "checkpoints").glob("*-last")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model in both formats, the second by NeMo's own importer, and data."""
    path = tmp_path_factory.mktemp("nemo")
    call("examples.nemo.prepare", "--folder", path, "--cpu")
    return path


def exported_factors(adapter):
    return [t.flatten() for f in read_adapter(adapter).modules.values() for t in (f.A, f.B)]


@pytest.mark.parametrize(("ranks", "precision"), [(1, "32"), (2, "32"), (2, "bf16-mixed")])
def test_finetune_ends_goes_on_and_peft_computes_the_same(folder, ranks, precision):
    name = f"tp{ranks}-{precision}"
    dense = "peft.bdlora.export_dense=true"
    mixed = precision != "32"
    first = train(folder, name, ranks, dense, steps=6, precision=precision)
    for seen in first:
        assert len(seen["losses"]) == 6
        assert seen["losses"][-1] < seen["losses"][0] - 0.3
        for (key, trains), before in seen["start"].items():
            same = torch.equal(before, seen["end"][key, trains])
            assert trains is (".adapter." in key)
            assert same is not trains, f"{key} {'did not train' if trains else 'is not frozen'}"
            assert before.dtype is (torch.bfloat16 if mixed else torch.float32)
        assert seen["end_copies"].keys() == ({k for k, trains in seen["end"] if trains and mixed})
        for key, copy in seen["end_copies"].items():
            assert copy.dtype is torch.float32
            assert torch.equal(copy.bfloat16(), seen["end"][key, True])
            assert (copy != copy.bfloat16().float()).any(), f"{key}: nothing that bf16 would lose"
    keys = list(
        FileSystemReader(last_checkpoint(folder, name) / "weights")
        .read_metadata()
        .state_dict_metadata
    )
    weights = [key for key in keys if not key.startswith("optimizer")]
    assert len(weights) > 0
    assert all(".adapter." in key for key in weights)

    second = train(folder, name, ranks, dense, steps=9, precision=precision)
    for before, seen in zip(first, second, strict=True):
        assert seen["step"] == 6
        assert len(seen["losses"]) == 3
        for key, value in before["end"].items():
            assert torch.equal(value, seen["start"][key]), f"{key} was not resumed"
        for key, copy in before["end_copies"].items():
            assert torch.equal(copy, seen["copies"][key]), f"the copy of {key} was not resumed"
        assert len(seen["moments"]) == len(before["end_moments"]) > 0
        assert all(map(torch.equal, seen["moments"], before["end_moments"]))

    found = last_checkpoint(folder, name)
    base = peft_logits(folder / "hf", None, TOKENS)
    logits = second[0]["logits"]
    assert (logits - base).abs().max() > 0.05 * base.abs().max()
    for export in ("hf_adapter", "hf_adapter-dense"):
        tolerance = MODEL_BFLOAT16 if mixed else (1e-5, 1e-4)
        computed = peft_logits(folder / "hf", found / export, TOKENS)
        assert_close(computed, logits, export, tolerance)
    if mixed:
        copies = torch.cat([c.flatten() for seen in second for c in seen["end_copies"].values()])
        exported = torch.cat(exported_factors(found / "hf_adapter"))
        assert torch.equal(exported.sort().values, copies.sort().values)
    config = json.loads((found / "hf_adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["use_bdlora"]["nblocks"] == 2
    config = json.loads((found / "hf_adapter-dense" / "adapter_config.json").read_text("utf-8"))
    assert not config.get("use_bdlora")


LAYOUTS = {
    "tp2-sp": (2, {"sequence_parallel": True}),
    "pp2": (2, {"stages": 2}),
    "tp2-pp2": (4, {"stages": 2}),
    "tp2-pp2-sp": (4, {"stages": 2, "sequence_parallel": True}),
}
#: Steps at which one rank's run ends and goes on; layouts train from the first to the second.
SAVED, LAID_OUT, STEPS = 4, 8, 10


@pytest.fixture(scope="module")
def alone(folder):
    """What one rank saw in the three parts of its run, the first of which stays for others."""
    seen = {}
    for steps in (SAVED, LAID_OUT, STEPS):
        (seen[steps],) = train(folder, "alone", 1, steps=steps)
        if steps == SAVED:
            shutil.copytree(folder / "alone", folder / "first")
    return seen


def _assert_went_on(seen, wanted):
    assert seen["step"] == wanted["step"]
    # NeMo sends it from the last pipeline stage to some of the first one's ranks.
    if seen["logits"] is not None or any(seen["losses"]):
        assert seen["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert seen["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
    for (key, trains), before in seen["start"].items():
        assert torch.equal(before, seen["end"][key, trains]) is not trains
    assert_same_adapter(seen["end_adapter"], wanted["end_adapter"], TRAINED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_rank_does_and_goes_on_there(name, folder, alone):
    ranks, settings = LAYOUTS[name]
    stages = settings.get("stages", 1)
    shutil.copytree(folder / "first", folder / name)
    # NeMo does not know the copy for its own, and would leave two last checkpoints.
    copied = last_checkpoint(folder, name)
    seen = train(folder, name, ranks, steps=LAID_OUT, **settings)
    shutil.rmtree(copied)
    found = peft_logits(folder / "hf", last_checkpoint(folder, name) / "hf_adapter", TOKENS)
    logits = [own["logits"] for own in seen if own["logits"] is not None]
    assert len(logits) == ranks // stages
    for computed in logits:
        assert_close(found, computed, name, (1e-5, 1e-4))
    saved = read_adapter(last_checkpoint(folder, name)).modules
    for own in seen:
        assert_same_adapter(own["adapter"], alone[SAVED]["end_adapter"])
        _assert_went_on(own, alone[LAID_OUT])
        assert_same_adapter(saved, own["end_adapter"])
    (back,) = train(folder, name, 1, steps=STEPS)
    assert_same_adapter(back["adapter"], seen[0]["end_adapter"])
    _assert_went_on(back, alone[STEPS])


def test_importing_registers_the_scheme():
    code = """
from tests.fakes.nemo_on_cpu import prepare
prepare()
import pytest
from nemo.collections.llm.peft import PEFT_STR2CLS, LoRA
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.nemo import BDLoRA, build_peft
assert PEFT_STR2CLS["bdlora"] is BDLoRA
assert isinstance(build_peft({"scheme": "lora", "lora": {"rank": 4}}), LoRA)
assert build_peft({"scheme": "none"}) is None
with pytest.raises(ConfigError, match="did you mean 'bdlora'"):
    build_peft({"scheme": "bdlor"})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
