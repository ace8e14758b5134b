"""`python -m benchmarks.device` on a CPU: what it finds, and what becomes of a part that breaks."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest
import torch

from bdlora_megatron.ops import add_grouped
from benchmarks.device.kernels import check_setup
from benchmarks.device.parts import PARTS, ROOT, Part, box_s, run_all, run_part
from benchmarks.device.random_cases import POPULARITY, Bounds, batches, draw_setup
from tests.unit.ops.cases import HAS_GPU, HAS_TRITON

pytestmark = pytest.mark.skipif(HAS_GPU, reason="sees that the parts run on a CPU")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton's interpreter")

BY_NAME = {part.name: part for part in PARTS}
BOUNDS = Bounds(features=40, rank=12, slots=5, tokens=(1, 4, 9))


def _own(name):
    return Part(name=name, module=f"tests.unit.bench.device_parts.{name}", share=1)


def _command(out, *options):
    command = [sys.executable, "-m", "benchmarks.device", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@needs_triton
def test_every_part_leaves_what_it_found(tmp_path):
    parts = ["tests", "kernels", "times", "capture"]
    tests = "tests/unit/ops/test_batch.py"
    done = _command(tmp_path, "--only", *parts, "--tests", tests)
    assert not done.returncode, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in parts}
    assert {n: f["state"] for n, f in found.items() if f["state"] != "passed"} == {
        "tests": "nothing ran"
    }
    _see_tests(found["tests"])
    _see_kernels(found["kernels"]["found"])
    _see_times(found["times"]["found"])
    assert found["capture"]["found"]["replays"] == 10
    assert "stand-in" in found["capture"]["line"]
    report = (tmp_path / "report.md").read_text()
    facts = [f"- torch: {torch.__version__}", "- commit: ", "- device: no GPU"]
    places = [report.index(text) for text in [*facts, *(f"| {name} | " for name in parts)]]
    assert max(places[:3]) < places[3]
    assert places[3:] == sorted(places[3:])
    # With the facts and the report; nothing unfinished is left over.
    assert len(list(tmp_path.iterdir())) == len(parts) + 2


def _see_tests(result):
    """Skipped tests are none that passed."""
    counts = result["found"]["counts"]
    assert counts["passed"] == counts["failed"] == 0
    assert counts["skipped"] > 0
    assert "needs triton and a GPU" in result["line"]


def _see_kernels(found):
    assert found["ran"] == found["wanted"] == 24
    assert found["wrong"] == []
    assert found["by"] == {"token": 12, "segment": 12}
    assert found["popularity"].keys() == set(POPULARITY)
    assert all(0 < error < 1e-2 for error in found["largest_rms_error"].values())


def _see_times(found):
    small, large = found["rows"]
    # Two adapters of rank 4 with two slices; inputs of 64, outputs of 48 and 16, read and written.
    for row, tokens in ((small, 4), (large, 300)):
        num_bytes = 2 * (2 * 4 * (2 * 64 + 64) + tokens * (64 + 2 * 64))
        assert row["floor_us"] == pytest.approx(1e-3 * num_bytes / found["copy_gb_per_s"])
        assert row["wrong"] is None
        assert row["grouped_us"]["warm"] > 0
        assert row["loop_us"]["warm"] > 0


@pytest.mark.engine
def test_the_engine_answers_as_peft_does():
    result = run_part(BY_NAME["engine"], seconds=200)
    assert result["state"] == "passed", result
    variants = result["found"].values()
    # Adapters come in as they are loaded, so that on a busy machine the last may come late.
    assert [variant["together"] >= 9 for variant in variants] == [True, True]
    for variant in variants:
        assert 0 < variant["log_probabilities_off"] <= variant["allowed"]
        assert variant["least_effect_of_an_adapter"] > 1


def test_a_step_has_the_gradients_of_peft():
    result = run_part(BY_NAME["train"], seconds=200)
    assert result["state"] == "passed", result
    assert len(result["found"]) == 4
    for variant in result["found"].values():
        # Seven projections of three layers, two factors each.
        assert variant["factors"] == 42
        assert 0 < variant["gradients_off"] <= variant["allowed"][0]


def test_a_part_that_fails_or_crashes_is_noted_and_the_next_begins(tmp_path):
    parts = [PARTS[0], _own("fails"), _own("crashes")]
    facts, failed, crashed = run_all(parts, seconds=300, out=tmp_path)
    assert facts["state"] == "passed"
    assert failed["state"] == crashed["state"] == "failed"
    assert failed["line"] == "ended with status 1: ValueError: out of luck"
    assert "fails.py" in failed["said_at_the_end"]
    assert "signal 11" in crashed["line"]
    assert crashed["found"] == {"done": 2}
    for result in (facts, failed, crashed):
        assert json.loads((tmp_path / f"{result['part']}.json").read_text()) == result
    report = (tmp_path / "report.md").read_text()
    assert "ValueError: out of luck" in report
    assert "until then: two of three" in report


def test_a_part_that_hangs_is_ended_with_all_its_processes():
    result = run_part(_own("hangs"), seconds=15)
    assert result["state"] == "time box over"
    assert "until then: one of three" in result["line"]
    _, alive = psutil.wait_procs(_running(result["found"]["child"]), timeout=20)
    assert not alive


def _running(pid):
    """The process, if it is there and no more than a number that nobody has asked for yet."""
    try:
        process = psutil.Process(pid)
        return [] if process.status() == psutil.STATUS_ZOMBIE else [process]
    except psutil.NoSuchProcess:
        return []


def test_a_failure_is_the_exit_status(tmp_path):
    more = "broken=tests.unit.bench.device_parts.fails"
    done = _command(tmp_path, "--only", "--more", more)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken: failed: ended with status 1: ValueError" in done.stdout


def test_time_that_a_part_leaves_goes_to_the_next():
    left, boxes = 540.0, []
    for number, part in enumerate(PARTS):
        boxes.append(box_s(part, PARTS[number + 1 :], left))
        left -= boxes[-1]
    assert boxes == pytest.approx([part.share for part in PARTS])
    assert left == pytest.approx(0)
    assert box_s(PARTS[-1], (), 200.0) == 200.0
    assert box_s(PARTS[0], PARTS[1:], 540.0) == pytest.approx(20)


def _right(out, x, slots, batch):
    add_grouped(out, x, slots, batch, implementation="reference")


def _twice(out, x, slots, batch):
    _right(out, x, slots, batch)
    _right(out, x, slots, batch)


def _everywhere(out, x, slots, batch):
    """Of the tokens without an adapter, too."""
    _right(out, x, slots, batch)
    out[batch.token_slot < 0] = 0.0


def _uninitialised(out, x, slots, batch):
    _right(out, x, slots, batch)
    out += torch.empty_like(out) * 0


def _never_the_same(out, x, slots, batch):
    _right(out, x, slots, batch)
    adapted = batch.token_slot >= 0
    out[adapted] = out[adapted] * (1 + 1e-7 * torch.rand_like(out[adapted]))


def _raises(out, x, slots, batch):
    raise RuntimeError("no such kernel")


BROKEN = {
    "scaled twice": (_twice, "error of"),
    "writes everywhere": (_everywhere, "what no adapter changes has changed"),
    "reads what it allocates": (_uninitialised, "error of nan"),
    "never the same": (_never_the_same, "two runs differ"),
    "raises": (_raises, "RuntimeError: no such kernel"),
}


def test_a_product_that_is_right_is_not_blamed():
    for seed in range(8):
        setup = draw_setup(seed, BOUNDS)
        assert [case["wrong"] for case in check_setup(setup, BOUNDS, 6, _right)] == [None] * 12


@pytest.mark.parametrize(("product", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_product_that_is_wrong_is_found(product, reason):
    reasons = []
    for seed in range(8):
        setup = draw_setup(seed, BOUNDS)
        reasons += [case["wrong"] or "" for case in check_setup(setup, BOUNDS, 6, product)]
    assert any(reason in found for found in reasons), reasons


def test_cases_follow_from_their_seed():
    setup = draw_setup(3, BOUNDS)
    assert setup == draw_setup(3, BOUNDS)
    assert setup != draw_setup(4, BOUNDS)
    assert [*batches(setup, BOUNDS, 6)] == [*batches(setup, BOUNDS, 6)]
    assert {popularity for popularity, _ in batches(setup, BOUNDS, 6)} == set(POPULARITY)
