"""`bdlora plan`, in process: presets, folders, JSON and errors."""

from __future__ import annotations

import json

import pytest

from bdlora_megatron.cli.main import main
from tests.golden.peft_cases import make_base


def test_a_preset_is_planned(capsys):
    assert main(["plan", "--model", "llama-3.1-8b", "--tp", "8"]) == 0
    out = capsys.readouterr().out
    assert "num_blocks=8, rank=32" in out
    assert "a100-nvlink" in out


def test_a_folder_is_planned_as_json(tmp_path, capsys):
    folder = make_base(tmp_path / "tiny")
    capsys.readouterr()
    arguments = ["plan", "--model", str(folder), "--tp", "4", "--hardware", "a100-pcie", "--json"]
    assert main([*arguments, "--adapters", "3"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["deployment"]["model"] == "tiny"
    assert data["deployment"]["shape"]["hidden_size"] == 48
    assert data["deployment"]["adapters"] == 3
    assert data["layouts"][0]["decode"]["adapter_communication"] == 0
    assert data["layouts"][2]["decode"]["adapter_communication"] > 0


def test_several_numbers_of_requests_and_some_layers(capsys):
    arguments = ["plan", "--model", "llama-3.1-8b", "--tp", "8", "--requests", "32,1"]
    arguments += ["--target-modules", "linear_qkv,linear_proj"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "32 requests of 1024 tokens, 8 adapters in a batch, on linear_qkv, linear_proj" in out
    assert [line.split()[0] for line in out.splitlines()[4:6]] == ["1", "32"]
    assert main([*arguments, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [plan["deployment"]["requests"] for plan in plans] == [1, 32]
    assert plans[0]["deployment"]["target_modules"] == ["linear_qkv", "linear_proj"]
    with pytest.raises(SystemExit):
        main([*arguments[:-4], "--requests", "1,many"])
    assert "'1,many'; wanted whole numbers with commas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama-9", "--tp", "8"], "neither a folder nor one of llama-3.1-8b"),
        (["--model", "llama-3.1-8b", "--tp", "3"], "use one of 1, 2, 4, 8"),
        (["--model", "llama-3.1-8b", "--tp", "0"], "tp=0"),
        (["--model", "llama-3.1-8b", "--tp", "8", "--requests", "8,0"], "requests=0"),
        (
            ["--model", "llama-3.1-8b", "--tp", "8", "--target-modules", "v_proj"],
            "v_proj is in linear_qkv",
        ),
    ],
)
def test_errors_are_one_line(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
