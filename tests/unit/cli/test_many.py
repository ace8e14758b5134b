"""Folders of adapters: all are looked at, whatever is wrong with some of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from bdlora_megatron.cli.convert import add_parser
from bdlora_megatron.convert import WriteOptions, read_adapter, write_adapter
from bdlora_megatron.errors import explain
from tests.unit.cli.adapters import make_adapters, run, run_json, visible
from tests.unit.convert.peft_files import tiny_llama, vanilla_tensors, write

TO_PEFT = ["--to", "peft", "--workers", "1"]


def change(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.fixture
def mixed(tmp_path):
    """Six adapters, four of which are refused: two for one reason, one for two, one for another."""
    made = make_adapters(tmp_path / "in", 6)
    for folder in made[:2]:
        change(folder, use_dora=True)
    change(made[2], use_dora=True, brand_new=3)
    (made[4] / "adapter_model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    return tmp_path / "in"


COUNTS = {
    "use_dora is set": 3,
    "'brand_new' is an unknown option and may change the update": 1,
    "the folder/adapter_model.safetensors cannot be read, it is a Git LFS pointer and not the "
    "file": 1,
}


def assert_counts(out):
    for cause, count in COUNTS.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"{cause} ")]
        assert line.split()[-1] == str(count)


def test_inspect_says_which_of_a_folder_are_refused_and_why(mixed, capsys):
    status, out, _ = run(capsys, "inspect", mixed)
    assert status == 1
    assert_counts(out)
    assert out.endswith("2 readable, 4 refused\n")
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("a0")}
    assert rows["a02"].endswith(
        "refused: use_dora is set; 'brand_new' is an unknown option and may change the update"
    )
    assert rows["a03"].split() == ["a03", "peft", "7", "4", "1", "14.2", "kB", "ok"]
    status, told = run_json(capsys, "inspect", mixed)
    assert [bool(one["refused"]) for one in told] == [True, True, True, False, True, False]
    assert [one["path"] for one in told] == [str(mixed / f"a0{n}") for n in range(6)]
    assert run(capsys, "inspect", mixed, "--ignore-unknown", "brand_new")[1].count("brand_new") == 0


def test_for_tp_reports_all_that_can_be_read(mixed, capsys):
    status, out, _ = run(capsys, "convert", mixed, "--for-tp", "2")
    assert status == 1
    assert_counts(out)
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("a0")}
    assert "exact" in rows["a03"]
    assert rows["a03"].endswith("--structure exact --tp 2")
    assert "a02 refused: cannot read the PEFT adapter" in out
    assert out.endswith("2 reported, 4 refused\n")
    status, told = run_json(capsys, "convert", mixed, "--for-tp", "2")
    assert ["refused" in one for one in told] == [True, True, True, False, True, False]
    # One that is refused is told as one.
    status, out, _ = run(capsys, "convert", mixed / "a00", "--for-tp", "2")
    assert (status, out.startswith("a00 refused: cannot read")) == (1, True)


def test_convert_counts_causes(mixed, tmp_path, capsys):
    status, out, _ = run(capsys, "convert", mixed, *TO_PEFT, "--out", tmp_path / "out")
    assert status == 1
    assert_counts(out)
    assert "2 converted, 4 failed" in out
    status, results = run_json(capsys, "convert", mixed, *TO_PEFT, "--out", tmp_path / "out")
    assert results[2]["causes"] == [*list(COUNTS)[:2]]


def test_verify_compares_two_folders_by_name(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    run(capsys, "convert", mixed, *TO_PEFT, "--out", out)
    status, text, _ = run(capsys, "verify", mixed, out)
    assert (status, text.endswith("4 missing, 2 same\n")) == (1, True)
    make_adapters(tmp_path / "good", 3)
    run(capsys, "convert", tmp_path / "good", *TO_PEFT, "--out", tmp_path / "same")
    status, told = run_json(capsys, "verify", tmp_path / "good", tmp_path / "same")
    assert status == 0
    assert {one["verdict"] for one in told} == {"same"}
    tensors = {name: 2 * tensor for name, tensor in vanilla_tensors(rank=4, layers=1).items()}
    write_adapter(
        read_adapter(write(tmp_path / "other", tensors, r=4)),
        tmp_path / "same/a01",
        "peft",
        options=WriteOptions(overwrite=True),
    )
    change(tmp_path / "same/a02", use_dora=True)
    status, text, _ = run(capsys, "verify", tmp_path / "good", tmp_path / "same")
    assert status == 2
    rows = {name: verdict for name, verdict, *_ in map(str.split, text.splitlines()[2:5])}
    assert rows == {"a00": "same", "a01": "different", "a02": "refused"}
    assert "use_dora is set" in text
    status, _, err = run(capsys, "verify", tmp_path / "good", mixed / "a03")
    assert status == 2
    assert "no adapter has the same name in" in err


def test_verify_tells_of_names_that_peft_ignores(tmp_path, capsys):
    good = write(tmp_path / "good")
    dead = write(tmp_path / "dead", {f"_orig_mod.{n}": t for n, t in vanilla_tensors().items()})
    status, out, _ = run(capsys, "verify", good, dead)
    assert status == 1
    assert f"{dead}: PEFT would ignore 28 of its tensors" in out
    assert "DIFFERENT in PEFT, the same in the numbers" in out
    status, told = run_json(capsys, "verify", dead, good)
    assert (status, told["same"], told["largest_relative"]) == (1, False, 0.0)
    assert told["ignored_by_peft"] == {str(dead): 28}
    # What was converted is alive, in whatever format.
    for format in ("peft", "megatron"):
        out = tmp_path / format
        run(capsys, "convert", dead, "--to", format, "--out", out, "--workers", "1")
        assert run(capsys, "verify", good, out / "dead")[0] == 0


# --- what lies beside and below an adapter --------------------------------------------------------


def test_pefts_second_adapter_is_converted_too(tmp_path, capsys):
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "two")
    status, results = run_json(
        capsys, "convert", tmp_path / "two", *TO_PEFT, "--out", tmp_path / "out"
    )
    assert status == 0
    assert [result["name"] for result in results] == ["two", "two.second"]
    assert {f.rank for f in read_adapter(tmp_path / "out/two").modules.values()} == {8}
    second = read_adapter(tmp_path / "out/two.second").modules
    assert {key.name for key in second} == {"v_proj"}
    assert "two.second" in run(capsys, "inspect", tmp_path / "two")[1]
    # The same from the folder above it.
    status, results = run_json(capsys, "convert", tmp_path, *TO_PEFT, "--out", tmp_path / "above")
    assert {r["name"] for r in results if r["status"] == "converted"} >= {"two", "two.second"}


def test_checkpoints_below_an_adapter_are_left_out_and_named(tmp_path, capsys):
    folder = write(tmp_path / "run")
    for step in (100, 200):
        write(folder / f"checkpoint-{step}")
    out = tmp_path / "out"
    status, _, err = run(capsys, "convert", folder, *TO_PEFT, "--out", out)
    assert (status, visible(out)) == (0, ["run"])
    assert "also holds 2 checkpoints of the training, such as checkpoint-100" in err
    status, _, _ = run(capsys, "convert", folder / "checkpoint-200", *TO_PEFT, "--out", out)
    assert (status, visible(out)) == (0, ["checkpoint-200", "run"])


@pytest.mark.parametrize("format", ["peft", "megatron"])
def test_a_tokenizer_and_a_chat_template_come_along(format, tmp_path, capsys):
    folder = write(tmp_path / "in")
    files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json")
    for name in files:
        (folder / name).write_text(f"content of {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    for name in ("optimizer.pt", "trainer_state.json", "README.md", "training_args.bin"):
        (folder / name).write_text("x")
    arguments = ["convert", folder, "--to", format, "--out", tmp_path / "out", "--workers", "1"]
    assert run(capsys, *arguments)[0] == 0
    made = tmp_path / "out" / "in"
    for name in files:
        assert (made / name).read_text() == f"content of {name}"
    assert (made / "additional_chat_templates" / "rag.jinja").read_text() == "rag"
    for name in ("optimizer.pt", "trainer_state.json", "training_args.bin"):
        assert not (made / name).exists()
    # A new template is another source; what is not carried along is none.
    (folder / "optimizer.pt").write_text("y")
    assert run_json(capsys, *arguments)[1][0]["status"] == "skipped"
    (folder / "chat_template.jinja").write_text("new")
    assert "from other files" in run_json(capsys, *arguments)[1][0]["error"]


# --- options --------------------------------------------------------------------------------------


def test_options_to_ignore_are_named_and_checked_first(tmp_path, capsys):
    folder = write(tmp_path / "in", brand_new=True)
    arguments = ["convert", folder, *TO_PEFT, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 1
    status, out, _ = run(capsys, *arguments, "--ignore-unknown", "brand_new")
    assert status == 0
    assert "in: it is read without options that change no update: brand_new" in out
    for command in (arguments, ["convert", folder, "--for-tp", "2"]):
        status, out, err = run(capsys, *command, "--ignore-unknown", "use_dora")
        assert (status, out) == (2, "")
        assert "use_dora cannot be ignored" in err


def base_of(folder, **changes):
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10} | changes
    tiny_llama(**settings).save_pretrained(folder)
    return folder


def test_ranks_above_the_heads_are_refused_with_a_base(tmp_path, capsys):
    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
    folder, base = write(tmp_path / "in"), base_of(tmp_path / "base", **few)
    heads = "4 query heads and 2 key-value heads, of which each of 8 ranks would hold part of one"
    fits = "use a tensor-parallel size of 1, 2, 4 (in layers.0.self_attn.k_proj"
    for options in (
        ["--for-tp", "8"],
        ["--structure", "exact", "--tp", "8", *TO_PEFT, "--out", tmp_path / "out"],
    ):
        status, out, _ = run(capsys, "convert", folder, *options, "--base", base)
        assert status == 1
        assert heads in out
        assert fits in out
    status, out, _ = run(capsys, "convert", folder, "--for-tp", "4", "--base", base)
    assert status == 0
    assert "is not known" not in out
    status, out, _ = run(capsys, "convert", folder, "--for-tp", "4")
    assert "whether 4 ranks divide the base model's key-value heads is not known" in out


def test_copies_of_base_weights_are_dropped_with_a_base(tmp_path, capsys):
    base = base_of(tmp_path / "base")
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    tensors = vanilla_tensors() | {"base_model.model.lm_head.weight": head.to(torch.bfloat16)}
    folder = write(tmp_path / "in", tensors)
    assert run(capsys, "inspect", folder)[0] == 1
    assert run(capsys, "inspect", folder, "--base", base)[0] == 0
    arguments = ["convert", folder, *TO_PEFT, "--out", tmp_path / "out", "--base", base]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert "in: it is read without tensors that equal the base model's" in out
    assert run(capsys, "verify", folder, tmp_path / "out/in", "--base", base)[0] == 0


# --- the operating system's errors ----------------------------------------------------------------


def test_a_full_or_read_only_disk_is_a_sentence(tmp_path):
    import errno

    for number, why in (
        (errno.ENOSPC, "there is no room left for /out; make room"),
        (errno.EDQUOT, "there is no room left for /out; make room"),
        (errno.EROFS, "/out is on a read-only file system"),
        (errno.EACCES, "this user may not read or write /out"),
        (errno.EFBIG, "/out became larger than files may be here"),
    ):
        assert why in explain(OSError(number, "x"), "/out")
        assert "Errno" not in explain(OSError(number, "x", "/out"))
    assert explain(ValueError("as it is")) == "as it is"


def test_a_file_that_cannot_be_written_whole_fails_its_adapter_with_a_sentence(tmp_path):
    write(tmp_path / "in")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from bdlora_megatron.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["convert", str(tmp_path / "in"), *TO_PEFT, "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert f"{tmp_path}/out/in became larger than files may be here" in done.stdout
    assert visible(tmp_path / "out") == []


def test_a_place_that_cannot_be_written_is_told_before_anything_is_done(tmp_path, capsys):
    folder = write(tmp_path / "in")
    status, out, err = run(capsys, "convert", folder, *TO_PEFT, "--out", "/sys/bdlora-out")
    assert (status, out) == (2, "")
    assert "read-only file system" in err or "this user may not" in err


def test_the_help_names_every_reading_option():
    import argparse

    parser = add_parser(argparse.ArgumentParser().add_subparsers())
    text = parser.format_help()
    for option in ("--base HF_DIR", "--allow-pickle", "--ignore-unknown KEY"):
        assert option in text
