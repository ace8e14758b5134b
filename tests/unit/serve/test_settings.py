"""Settings from files, arguments and the environment, and where adapters may be loaded from."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve import SlotCapacity, cli
from bdlora_megatron.serve.engine.options import EngineOptions
from bdlora_megatron.serve.settings import ApiKey, ServeSettings


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.settings_of(parser.parse_args(["serve", *map(str, arguments)]))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("a", "b", ".hidden"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    return folder


def test_arguments_win_over_the_file(model, tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"model: {model}\ntensor_parallel_size: 4\nport: 9000\nmax_loras: 3\n"
        f"adapters: {{b: {tmp_path}/adapters/a, c: {tmp_path}/adapters/b}}\n"
        "api_keys: [longenough, {key: limited-key, models: [b]}]\n"
    )
    made = parse("--config", config, "--tp", "2", "--set", "max_loras=5", "--adapters",
                 tmp_path / "adapters")  # fmt: skip
    assert (made.tensor_parallel_size, made.port, made.max_loras) == (2, 9000, 5)
    assert set(made.adapters) == {"a", "b", "c"}
    assert made.adapters["b"] == str(tmp_path / "adapters" / "b")
    assert made.api_keys == (
        ApiKey(key="longenough"),
        ApiKey(key="limited-key", models=("b",)),
    )
    assert made.base_name == "base"
    assert "longenough" not in repr(made)


def test_keys_come_from_the_environment(model, monkeypatch):
    monkeypatch.setenv("BDLORA_API_KEYS", "first-key,second-key")
    monkeypatch.setenv("BDLORA_ADMIN_KEY", "admin-key")
    made = parse("--model", model)
    assert [key.key for key in made.api_keys] == ["first-key", "second-key"]
    assert made.admin_key == "admin-key"


def test_cuda_graphs_are_off_and_refused_on_a_cpu(model):
    assert not parse("--model", model).cuda_graphs
    assert parse("--model", model, "--set", "cuda_graphs=true").cuda_graphs
    with pytest.raises(ConfigError, match="cuda_graphs on a CPU"):
        parse("--model", model, "--cpu", "--set", "cuda_graphs=true")


def test_layers_are_megatrons_unless_transformer_engines_are_asked_for(model):
    assert parse("--model", model).layers == "megatron"
    asked = parse("--model", model, "--set", "layers=transformer_engine")
    assert asked.layers == "transformer_engine"
    with pytest.raises(ConfigError, match="Transformer Engine runs on GPUs"):
        parse("--model", model, "--cpu", "--set", "layers=transformer_engine")
    with pytest.raises(ConfigError, match="layers is 'te'; wanted one of megatron"):
        parse("--model", model, "--set", "layers=te")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_lora": 3}, "max_lora is unknown; did you mean max_loras"),
        ({"tensor_parallel_size": "two"}, "tensor_parallel_size is 'two'; wanted a whole number"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True"),
        ({"cpu": 1}, "cpu is 1; wanted true or false"),
        ({"port": -1}, "port is -1; wanted at least 0"),
        ({"layout": "diagonal"}, "layout is 'diagonal'; wanted one of bdlora, half_sharded, slora"),
        ({"dtype": "int8"}, "dtype is 'int8'; wanted one of float32, bfloat16"),
        ({"adapters": ["a"]}, "adapters is \\['a'\\]; wanted a section"),
        ({"adapters": {"base": "x"}, "served_model_name": "base"}, "as the base model is"),
        ({"adapters": {"a b": "x"}}, "adapter name"),
        (
            {"api_keys": ["short"]},
            "api_keys.0.key is wrong .its value is not shown.; wanted at least 8 char",
        ),
        ({"api_keys": [{"key": "longenough", "model": 1}]}, "api_keys.0.model is unknown"),
        (
            {"admin_key": "short"},
            "admin_key is wrong .its value is not shown.; wanted at least 8 char",
        ),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        ServeSettings.from_dict({"model": "/m/base0", **values})


def test_every_problem_is_told_and_no_secret():
    values = {"model": "m", "port": "x", "max_lora": 1, "tp": 2, "admin_key": "hunter2"}
    with pytest.raises(ConfigError) as caught:
        ServeSettings.from_dict(values)
    assert str(caught.value).startswith("4 problem(s) in the server's settings:\n- ")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match="model is missing"):
        ServeSettings.from_dict({})


def test_adapters_of_the_same_name_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"several adapters are called \['a'\]"):
        parse("--model", model, "--adapters", tmp_path / "adapters", f"a={model}")


def test_only_folders_below_the_allowed_ones_are_found(tmp_path):
    allowed, outside = tmp_path / "in", tmp_path / "in-not"
    for folder in (allowed / "x", outside):
        folder.mkdir(parents=True)
    (allowed / "link").symlink_to(outside)
    made = ServeSettings(model="m", adapter_dirs=(str(allowed),))
    assert made.adapter_path(str(allowed / "x")) == allowed / "x"
    for path in (outside, allowed / ".." / "in-not", allowed / "link", "/"):
        with pytest.raises(ConfigError, match="below none"):
            made.adapter_path(str(path))


def test_the_command_line_does_not_import_torch():
    """`bdlora --help` stays fast, and the API server's process small."""
    code = (
        "import sys, bdlora_megatron.serve.cli, bdlora_megatron.serve.server, "
        "bdlora_megatron.serve.generate\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


OLD = {
    "block_tokens": "block_size",
    "cache_bytes": "kv_cache_memory_bytes",
    "max_length": "max_model_len",
    "max_rank": "max_lora_rank",
    "max_requests": "max_num_seqs",
    "num_slots": "max_loras",
    "served_name": "served_model_name",
    "step_tokens": "max_num_batched_tokens",
    "tp": "tensor_parallel_size",
}


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_name_is_refused_with_the_new_one(old, new):
    assert new in {field.name for field in fields(ServeSettings)}
    with pytest.raises(ConfigError, match=rf"{old} is now called {new}"):
        ServeSettings.from_dict({"model": "m", old: 1})


def test_what_the_engine_is_told_has_the_settings_names():
    """So that a message about a size names a setting that exists."""
    named = {field.name for kind in (EngineOptions, SlotCapacity) for field in fields(kind)}
    own = {"layouts", "target_modules", "implementation", "dtype"}
    assert named - own <= {field.name for field in fields(ServeSettings)}
