"""`bdlora convert`: many adapters, of which some are broken and some are done."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from bdlora_megatron.cli.jobs import ConversionJob
from bdlora_megatron.cli.pool import run_jobs
from bdlora_megatron.cli.records import locked
from bdlora_megatron.convert import read_adapter
from bdlora_megatron.convert.pipeline import Conversion
from tests.reference import dense_update
from tests.unit.cli.adapters import assert_same_files, make_adapters, run, run_json, visible
from tests.unit.convert.peft_files import vanilla_tensors

EXACT = ["--to", "peft", "--structure", "exact", "--tp", "4", "--workers", "1"]


def statuses(results):
    return {result["name"]: result["status"] for result in results}


def test_an_adapter_becomes_block_diagonal_and_computes_the_same(tmp_path, capsys):
    (source,) = make_adapters(tmp_path / "in", 1)
    status, (result,) = run_json(capsys, "convert", source, *EXACT, "--out", tmp_path / "out")
    assert (status, result["status"], result["summary"]["error"]) == (0, "converted", 0.0)
    before, after = read_adapter(source), read_adapter(tmp_path / "out/a00")
    for key, factors in before.modules.items():
        assert (after.modules[key].num_blocks, after.modules[key].rank) == (4, 16)
        torch.testing.assert_close(
            dense_update(after.modules[key], dtype=torch.float64),
            dense_update(factors, dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


def test_there_and_back_is_bit_equal(tmp_path, capsys):
    (source,) = make_adapters(tmp_path / "in", 1)
    there, back = tmp_path / "there", tmp_path / "back"
    assert run(capsys, "convert", source, *EXACT, "--out", there)[0] == 0
    options = ["--to", "peft", "--dense", "--workers", "1"]
    assert run(capsys, "convert", there / "a00", *options, "--out", back)[0] == 0
    kept = ["--to", "peft", "--structure", "exact", "--tp", "1", "--workers", "1"]
    assert run(capsys, "convert", back / "a00", *kept, "--out", tmp_path / "again")[0] == 0
    before, after = read_adapter(source), read_adapter(tmp_path / "again/a00")
    for key, factors in before.modules.items():
        assert torch.equal(after.modules[key].A, factors.A)
        assert torch.equal(after.modules[key].B, factors.B)
        assert after.modules[key].scale == factors.scale


def test_one_bad_adapter_does_not_stop_the_others(tmp_path, capsys):
    make_adapters(tmp_path / "in", 3)
    config = tmp_path / "in/a01/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert "a01 failed: cannot read the PEFT adapter" in out
    assert "use_dora is set" in out
    assert "1 failed, 2 skipped" not in out
    assert "2 converted, 1 failed" in out
    assert "Traceback" not in out + err
    assert visible(tmp_path / "out") == ["a00", "a02"]


def test_finished_adapters_are_skipped_until_something_changes(tmp_path, capsys):
    make_adapters(tmp_path / "in", 2)
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "out/a00/adapter_model.safetensors").stat()
    status, results = run_json(capsys, *arguments)
    assert (status, statuses(results)) == (0, {"a00": "skipped", "a01": "skipped"})
    assert (tmp_path / "out/a00/adapter_model.safetensors").stat() == before
    assert results[0]["summary"]["modules"][0]["rank"] == 16
    # Another source, then other options: the result is in the way, and only --overwrite replaces.
    save_file(vanilla_tensors(rank=4, layers=2), tmp_path / "in/a00/adapter_model.safetensors")
    for changed in (arguments, [*arguments, "--dtype", "bfloat16"]):
        status, results = run_json(capsys, *changed)
        failed = [result for result in results if result["status"] == "failed"]
        assert status == 1
        assert "was made from other files or with other options" in failed[0]["error"]
    status, results = run_json(capsys, *arguments, "--overwrite")
    assert (status, statuses(results)) == (0, {"a00": "converted", "a01": "skipped"})
    assert len(read_adapter(tmp_path / "out/a00").modules) == 14


def test_files_that_are_not_the_adapters_do_not_count(tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    (tmp_path / "in/a00/optimizer.pt").write_bytes(b"1")
    assert statuses(run_json(capsys, *arguments)[1]) == {"a00": "skipped"}


def test_a_changed_result_is_not_taken_for_a_finished_one(tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    config = tmp_path / "out/a00/adapter_config.json"
    config.write_text(config.read_text() + " ")
    status, (result,) = run_json(capsys, *arguments)
    assert status == 1
    assert "was changed since it was made" in result["error"]
    assert config.read_text().endswith(" ")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    theirs = tmp_path / "out/a00"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("all of it")
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    for more in ([], ["--overwrite"]):
        status, (result,) = run_json(capsys, *arguments, *more)
        assert (status, result["status"]) == (1, "failed")
        assert (theirs / "thesis.tex").read_text() == "all of it"


def test_a_failed_overwrite_keeps_the_result_and_its_record(tmp_path, capsys):
    (source,) = make_adapters(tmp_path / "in", 1)
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    good = (source / "adapter_model.safetensors").read_bytes()
    (source / "adapter_model.safetensors").write_bytes(good[:-100])
    assert run(capsys, *arguments, "--overwrite")[0] == 1
    (source / "adapter_model.safetensors").write_bytes(good)
    assert statuses(run_json(capsys, *arguments)[1]) == {"a00": "skipped"}


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--dtype", "float64"]])
def test_the_type_is_the_one_asked_for(more, tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    arguments = ["convert", tmp_path / "in/a00", "--to", "peft", "--out", tmp_path / "out", *more]
    status, (result,) = run_json(capsys, *arguments)
    assert status == 0
    written = read_adapter(tmp_path / "out/a00").modules.values()
    assert {str(factors.dtype) for factors in written} == {f"torch.{more[1]}"}
    assert (result["summary"]["error"] > 0) == (more[1] == "bfloat16")
    assert result["summary"]["bytes"] == sum(
        factors.num_parameters * factors.dtype.itemsize for factors in written
    )


def test_the_base_model_must_fit(tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    base = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 10,
        "vocab_size": 31,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    for name, changes in (("right", {}), ("wrong", {"hidden_size": 64, "head_dim": 8})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(base | changes))
    arguments = ["convert", tmp_path / "in", *EXACT]
    right = [*arguments, "--out", tmp_path / "out", "--base", tmp_path / "right"]
    assert run(capsys, *right)[0] == 0
    wrong = [*arguments, "--out", tmp_path / "not", "--base", tmp_path / "wrong"]
    status, (result,) = run_json(capsys, *wrong)
    assert status == 1
    assert "hidden_size is 48 in the adapter and 64 in the base model" in result["error"]
    assert "q_size is 80 in the adapter and 64 in the base model" in result["error"]
    assert visible(tmp_path / "not") == []


USAGE = {
    "nothing": ([], "needs --to FORMAT and --out DIR"),
    "no_tp": (["--to", "peft", "--out", "out", "--structure", "exact"], "needs --tp P"),
    "rank_without_truncate": (
        ["--to", "peft", "--out", "out", "--rank", "4"],
        "'keep', which loses nothing",
    ),
    "truncate_to_nothing": (
        ["--to", "peft", "--out", "out", "--structure", "truncate", "--tp", "2"],
        "needs either a rank or",
    ),
    "tp": (["--to", "peft", "--out", "out", "--structure", "exact", "--tp", "0"], "num_blocks=0"),
    "plot_alone": (["--to", "peft", "--out", "out", "--plot", "p.png"], "--plot goes with"),
    "report_and_convert": (["--for-tp", "2", "--out", "out"], "converts nothing"),
    "workers": (["--to", "peft", "--out", "out", "--workers", "0"], "--workers 0; wanted 1"),
    "over_the_source": (["--to", "peft", "--out", "in"], "over or into the source"),
    "into_the_source": (["--to", "peft", "--out", "in/a00/out"], "over or into the source"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_told_before_anything_is_done(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_adapters(tmp_path / "in", 1)
    arguments, message = USAGE[case]
    status, out, err = run(capsys, "convert", "in/a00", *arguments)
    assert status == 2
    assert message in err
    assert err.startswith("bdlora: error: ")
    assert out == ""
    assert visible(tmp_path) == ["in"]
    assert visible(tmp_path / "in/a00") == ["adapter_config.json", "adapter_model.safetensors"]


def test_sources_that_are_no_adapters_or_share_a_name_are_refused_together(tmp_path, capsys):
    make_adapters(tmp_path / "one", 2)
    make_adapters(tmp_path / "two", 2)
    (tmp_path / "empty").mkdir()
    sources = [tmp_path / name for name in ("one", "two", "empty", "missing")]
    status, _, err = run(capsys, "convert", *sources, *EXACT, "--out", tmp_path / "out")
    assert status == 2
    assert "2 adapters are named 'a00'" in err
    assert f"{tmp_path}/one/a01, {tmp_path}/two/a01" in err
    assert f"{tmp_path}/empty is no adapter of a known format" in err
    assert f"{tmp_path}/missing is no folder" in err
    assert not (tmp_path / "out").exists()


def test_two_conversions_do_not_write_into_one_folder(tmp_path, capsys):
    make_adapters(tmp_path / "in", 1)
    with locked(tmp_path / "out"):
        status, _, err = run(capsys, "convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out")
    assert status == 2
    assert "another conversion writes into" in err
    assert run(capsys, "convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out")[0] == 0


def test_workers_make_the_same_as_one_process(tmp_path, capsys):
    make_adapters(tmp_path / "in", 5)
    config = tmp_path / "in/a03/adapter_config.json"
    config.write_text("{")
    arguments = ["convert", tmp_path / "in", *EXACT]
    assert run(capsys, *arguments, "--out", tmp_path / "one")[0] == 1
    status, results = run_json(capsys, *arguments, "--out", tmp_path / "two", "--workers", "2")
    assert status == 1
    assert statuses(results) == {
        name: "failed" if name == "a03" else "converted" for name in statuses(results)
    }
    assert list(statuses(results)) == ["a00", "a01", "a02", "a03", "a04"]
    assert visible(tmp_path / "one") == visible(tmp_path / "two") == ["a00", "a01", "a02", "a04"]
    for name in visible(tmp_path / "one"):
        assert_same_files(tmp_path / "one" / name, tmp_path / "two" / name)


class DeadlyJob(ConversionJob):
    """Kills the worker that takes it up."""

    @property
    def name(self):
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return "deadly"


def test_a_dying_worker_fails_its_adapter_alone(tmp_path):
    conversion = Conversion(format="peft")
    jobs = [
        ConversionJob(source=source, out=tmp_path / "out", conversion=conversion)
        for source in make_adapters(tmp_path / "in", 4)
    ]
    jobs.insert(1, DeadlyJob(source=tmp_path / "in/a00", out=tmp_path, conversion=conversion))
    results = {result.name: result for result in run_jobs(jobs, workers=2)}
    assert len(results) == 5
    assert results["deadly"].status == "failed"
    assert "the worker process died" in results["deadly"].error
    assert [name for name in results if results[name].status == "failed"] == ["deadly"]
    assert visible(tmp_path / "out") == ["a00", "a01", "a02", "a03"]


def test_the_installed_command_and_the_module_are_the_same(tmp_path):
    (source,) = make_adapters(tmp_path / "in", 1)
    command = os.path.join(os.path.dirname(sys.executable), "bdlora")
    for start in ([command], [sys.executable, "-m", "bdlora_megatron"]):
        out = tmp_path / os.path.basename(start[-1])
        done = subprocess.run(
            [*start, "convert", str(source), *EXACT, "--out", str(out)],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "1 converted" in done.stdout


def test_debug_shows_where_an_error_came_from(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    arguments = ["convert", tmp_path / "in", *EXACT, "--out", tmp_path / "out"]
    assert "Traceback" not in run(capsys, *arguments)[2]
    assert "Traceback" in run(capsys, *arguments, "--debug")[2]
    make_adapters(tmp_path / "in", 1)
    (tmp_path / "in/a00/adapter_config.json").write_text("{")
    assert "Traceback" in run(capsys, *arguments, "--debug")[1]


def test_choices_are_reported_and_nothing_is_written(tmp_path, capsys):
    (source,) = make_adapters(tmp_path / "in", 1)
    status, (report,) = run_json(capsys, "convert", source, "--for-tp", 2)
    assert status == 0
    assert report["recommended"] == "exact"
    status, out, _ = run(capsys, "convert", source, "--for-tp", 2)
    assert "a00 on 2 tensor-parallel ranks" in out
    assert visible(tmp_path) == ["in"]
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    picture = tmp_path / "error.png"
    assert run(capsys, "convert", source, "--for-tp", 2, "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
