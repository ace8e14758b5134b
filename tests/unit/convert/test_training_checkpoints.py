"""Checkpoints of trainings as adapters: of our runs, Megatron-Bridge and Megatron-SWIFT."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from bdlora_megatron.convert import (
    BaseShape,
    ModuleKey,
    WriteOptions,
    detect_format,
    read_adapter,
    write_adapter,
)
from bdlora_megatron.convert.adapter.neutral import MODULE_NAMES
from bdlora_megatron.convert.megatron.dist_tensors import Chunk
from bdlora_megatron.convert.megatron.dist_writer import write_dist_tensors
from bdlora_megatron.convert.megatron.names import fuse, linear_of, stem
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from tests.reference import dense_update
from tests.unit.convert import random_adapters
from tests.unit.convert.random_adapters import HEAD_DIM, HEADS, adapter, assert_same, factors

OLD = Path(__file__).parents[2] / "fixtures" / "5ae9907"
BASE = BaseShape(num_heads=HEADS, num_kv_heads=4, head_dim=HEAD_DIM)


#: All modules of two layers.
seven = partial(random_adapters.seven, layers=2)


def write_tensors(folder, tensors):
    """A distributed checkpoint; each tensor whole, or a list of its parts by rows."""
    folder.mkdir(parents=True)
    chunks, parts = [], []
    for name, value in tensors.items():
        pieces = value if isinstance(value, list) else [value]
        rows = sum(piece.shape[0] for piece in pieces)
        start = 0
        for piece in pieces:
            chunks.append(
                Chunk(
                    name=name,
                    size=(rows, piece.shape[1]),
                    offsets=(start, 0),
                    sizes=tuple(piece.shape),
                    dtype=piece.dtype,
                )
            )
            parts.append(piece)
            start += piece.shape[0]
    write_dist_tensors(folder, chunks, lambda number: parts[number], {})
    return folder


def own_tensors(source, dtype=None):
    """The tensors as our layers name them."""
    tensors = {}
    for key, f in source.modules.items():
        name = stem(*linear_of(key.name), key.layer)
        for side, tensor in (("in", f.A), ("out", f.B)):
            tensors[f"{name}linear_{side}.weight"] = tensor if dtype is None else tensor.to(dtype)
    return tensors


# --- bdlora train ---------------------------------------------------------------------------------


def run_json(folder, scheme="bdlora", **section):
    settings = {"model": {"hf_path": "some/base"}, "peft": {"scheme": scheme, scheme: section}}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_a_step_of_a_run_is_what_the_run_exported():
    assert detect_format(OLD / "run" / "step_00000002") == "megatron"
    step, exported = read_adapter(OLD / "run" / "step_00000002"), read_adapter(OLD / "run/adapter")
    assert_same(step, exported)
    assert step.metadata["base_model_name_or_path"] == "/data/base"
    assert step.name == "step_00000002"


@pytest.mark.parametrize(
    ("scheme", "section", "num_blocks", "scale"),
    [
        ("bdlora", {"num_blocks": 4, "rank": 8, "alpha": None, "use_rslora": False}, 4, 2.0),
        ("bdlora", {"num_blocks": 2, "rank": None, "alpha": 4, "use_rslora": True}, 2, 4 / 8**0.5),
        ("lora", {"rank": 8, "alpha": 12, "use_rslora": False}, 1, 1.5),
        ("slora", {}, 1, 2.0),
    ],
)
def test_scale_and_blocks_come_from_the_runs_settings(scheme, section, num_blocks, scale, tmp_path):
    wanted = seven(num_blocks=num_blocks, scale=scale)
    folder = write_tensors(tmp_path / "step_00000006", own_tensors(wanted))
    run_json(folder, "bdlora" if scheme == "bdlora" else "lora", **section)
    if scheme == "slora":
        facts = json.loads((folder / "run.json").read_text())
        facts["settings"]["peft"]["scheme"] = "slora"
        (folder / "run.json").write_text(json.dumps(facts))
    assert_same(read_adapter(folder), wanted)


def test_float32_copies_of_mixed_precision_are_read(tmp_path):
    wanted = seven()
    narrow = own_tensors(wanted, torch.bfloat16)
    state = {f"optimizer.state.fp32_param.{name}": t for name, t in own_tensors(wanted).items()}
    moments = {f"optimizer.state.exp_avg.{name}": t for name, t in narrow.items()}
    folder = write_tensors(tmp_path / "step_00000006", narrow | state | moments)
    assert_same(read_adapter(run_json(folder, num_blocks=1)), wanted)
    bare = write_tensors(tmp_path / "bare" / "step_00000006", narrow)
    got = read_adapter(run_json(bare, num_blocks=1))
    assert {f.dtype for f in got.modules.values()} == {torch.bfloat16}


def test_runs_without_an_adapter_or_with_broken_settings_are_refused(tmp_path):
    folder = write_tensors(tmp_path / "step_00000006", own_tensors(seven()))
    for text, why in (
        ("[", "cannot be read"),
        ("{}", "of no checkpoint that bdlora train wrote"),
        ('{"settings": {"peft": {"scheme": "none"}}}', "says scheme 'none'; it has no adapter"),
        ('{"settings": {"peft": {"scheme": "lora", "lora": {"alpha": "x"}}}}', "alpha is 'x'"),
        (
            '{"settings": {"peft": {"scheme": "bdlora", "bdlora": {"num_blocks": 0}}}}',
            "blocks is 0",
        ),
    ):
        (folder / "run.json").write_text(text)
        with pytest.raises(AdapterFormatError, match=why):
            read_adapter(folder)


def test_a_training_checkpoint_is_never_replaced(tmp_path):
    folder = run_json(write_tensors(tmp_path / "step_00000006", own_tensors(seven())), num_blocks=1)
    with pytest.raises(ConfigError, match="is a checkpoint of a training and is not replaced"):
        write_adapter(seven(), folder, "peft", options=WriteOptions(overwrite=True))
    assert len(read_adapter(folder).modules) == 14


@pytest.mark.parametrize("name", ["run.json", ".metadata", "__0_0.distcp"])
def test_pointers_in_a_checkpoint_are_named(name, tmp_path):
    folder = run_json(write_tensors(tmp_path / "step_00000006", own_tensors(seven())), num_blocks=1)
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 9000)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder)
    assert name in str(caught.value)
    if name != "__0_0.distcp":
        assert "git lfs pull" in str(caught.value)


# --- iterations and their tracker -----------------------------------------------------------------


@pytest.fixture
def iterations(tmp_path):
    """Three iterations of which the last was being written when the training died."""
    made = {}
    for number in (100, 200, 300):
        made[number] = seven(scale=float(number))
        path = write_adapter(made[number], tmp_path / str(number), "bridge")
        shutil.copytree(path / "iter_0000000", tmp_path / "all" / f"iter_{number:07}")
    return tmp_path / "all", made


def test_the_iteration_that_the_tracker_names_is_read(iterations):
    folder, made = iterations
    assert_same(read_adapter(folder), made[300])
    (folder / "latest_checkpointed_iteration.txt").write_text("200\n")
    got = read_adapter(folder)
    assert_same(got, made[200])
    assert got.metadata["iteration"] == "iter_0000200"
    assert_same(read_adapter(folder / "iter_0000100"), made[100])
    (folder / "latest_checkpointed_iteration.txt").unlink()
    torch.save({"step": torch.tensor(100)}, folder / "latest_train_state.pt")
    assert_same(read_adapter(folder), made[100])


def test_an_unfinished_iteration_does_not_count(iterations, caplog):
    folder, made = iterations
    (folder / "iter_0000300" / ".metadata").unlink()
    assert_same(read_adapter(folder), made[200])
    assert caplog.text == ""
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    with caplog.at_level(logging.WARNING):
        assert_same(read_adapter(folder), made[200])
    assert "names iteration 300, which is not there or not complete; iter_0000200" in caplog.text
    (folder / "latest_checkpointed_iteration.txt").write_text("many")
    with caplog.at_level(logging.WARNING):
        assert_same(read_adapter(folder), made[200])
    assert "its tracker cannot be read" in caplog.text
    for number in (100, 200):
        (folder / f"iter_{number:07}" / ".metadata").unlink()
    with pytest.raises(AdapterFormatError, match="holds no complete checkpoint"):
        read_adapter(folder)


# --- our integration ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["bdlora_megatron.bridge.BDLoRA", "x.BDLoRA"])
def test_the_integrations_own_iterations_are_read(target, tmp_path):
    wanted = seven(num_blocks=4, scale=2.0)
    folder = write_tensors(tmp_path / "iter_0000012", own_tensors(wanted))
    peft = {
        "_target_": target,
        "dim": 8,
        "alpha": None,
        "num_blocks": 4,
        "base_model": "some/base",
        "use_rslora": False,
    }
    model = {"num_attention_heads": HEADS, "num_query_groups": 4, "kv_channels": HEAD_DIM}
    (folder / "run_config.yaml").write_text(json.dumps({"model": model, "peft": peft}))
    if target == "x.BDLoRA":
        with pytest.raises(AdapterFormatError, match=r"the adapter is a x\.BDLoRA"):
            read_adapter(folder)
        return
    got = read_adapter(folder)
    assert_same(got, wanted)
    assert got.metadata["base_model_name_or_path"] == "some/base"
    assert_same(read_adapter(tmp_path), wanted)
    # As NeMo 2 keeps it.
    (tmp_path / "nemo" / "context").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "nemo" / "weights")
    settings = {
        "config": model,
        "model_transform": peft | {"_target_": "bdlora_megatron.nemo.BDLoRA"},
    }
    (tmp_path / "nemo" / "context" / "model.yaml").write_text(json.dumps(settings))
    assert_same(read_adapter(tmp_path / "nemo"), wanted)


@pytest.mark.parametrize("alpha", [1e-8, -1e-8, 1e22, 3.0, 1.5e-7])
def test_a_written_alpha_is_read_as_the_number_it_is(alpha, tmp_path):
    import yaml

    wanted = seven(layers=1, scale=alpha / 8)
    path = write_adapter(wanted, tmp_path / "a", "bridge")
    assert_same(read_adapter(path), wanted)
    file = path / "iter_0000000" / "run_config.yaml"
    assert yaml.safe_load(file.read_text())["peft"]["alpha"] == alpha
    # As OmegaConf and people write it.
    file.write_text(file.read_text().replace(".0e", "e"))
    assert_same(read_adapter(path), wanted)


# --- Megatron-SWIFT -------------------------------------------------------------------------------


def swift(folder, source, *, tp=1, number=100, **config):
    """A checkpoint as Megatron-SWIFT saves it at `tp` ranks."""
    tensors = {}
    for layer in range(2):
        for linear, parts in (
            ("self_attention.linear_qkv", {"q": "q_proj", "k": "k_proj", "v": "v_proj"}),
            ("self_attention.linear_proj", {"": "o_proj"}),
            ("mlp.linear_fc1", {"gate": "gate_proj", "up": "up_proj"}),
            ("mlp.linear_fc2", {"": "down_proj"}),
        ):
            own = {p: source.modules[ModuleKey(layer=layer, name=n)] for p, n in parts.items()}
            whole = own[""] if "" in own else fuse(linear, own, BASE)
            B = whole.B
            if linear.endswith("fc1"):
                gate, up = B.chunk(2)
                pairs = zip(gate.chunk(tp), up.chunk(tp), strict=True)
                B = [torch.cat(pair) for pair in pairs]
            name = f"decoder.layers.{layer}.{linear}.lora_"
            tensors |= {f"{name}A.default.weight": whole.A, f"{name}B.default.weight": B}
    write_tensors(folder / f"iter_{number:07}", tensors)
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["linear_qkv"]}
    raw |= {"lora_dtype": "bfloat16", "modules_to_save": []} | config
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(number))
    return folder


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_swifts_checkpoints_are_read_whatever_size_saved_them(tp, tmp_path):
    wanted = seven(shared=True)
    folder = swift(tmp_path / "checkpoint-100", wanted, tp=tp)
    assert detect_format(folder) == detect_format(folder / "iter_0000100") == "bridge"
    assert_same(read_adapter(folder, base=BASE), wanted)
    assert_same(read_adapter(folder / "iter_0000100", base=BASE), wanted)
    with pytest.raises(AdapterFormatError, match="pass --base HF_DIR"):
        read_adapter(folder)
    # What ms-swift exported by itself is PEFT's.
    shutil.copy(OLD / "run/adapter/adapter_model.safetensors", folder)
    assert detect_format(folder) == "peft"


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"r": 4}, "lora_A has rank 8, but the config says 4"),
        ({"use_dora": True}, "use_dora is set"),
        ({"rank_pattern": {"linear_qkv": 4}}, "convert it with ms-swift itself"),
        ({"new_option": 1}, "'new_option' is an unknown option"),
    ],
)
def test_what_swift_trains_beyond_plain_lora_is_refused(config, why, tmp_path):
    folder = swift(tmp_path / "checkpoint-100", seven(shared=True), **config)
    with pytest.raises(AdapterFormatError, match=why):
        read_adapter(folder, base=BASE)


# --- one scale for all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "exact"), [("bridge", True), ("bridge", False), ("slora", False)]
)
def test_scales_that_differ_are_folded_in_and_said(format, exact, tmp_path, caplog):
    names = MODULE_NAMES if format == "bridge" else ("q_proj", "k_proj", "v_proj", "o_proj")
    modules = {
        ModuleKey(layer=0, name=name): factors(
            name,
            rank=8,
            kv_heads=8,
            seed=n,
            scale=(2.0, 0.5 if exact else 0.7)[n % 3 == 1],
        )
        for n, name in enumerate(names)
    }
    source = adapter(modules, kv_heads=8, layers=1)
    with caplog.at_level(logging.WARNING):
        path = write_adapter(source, tmp_path / "a", format, options=WriteOptions(tp=2))
    assert "has 2 scales and the format one" in caplog.text
    got = read_adapter(path)
    assert {f.scale for f in got.modules.values()} == {2.0}
    for key, f in modules.items():
        update, wanted = (dense_update(x, dtype=torch.float64) for x in (got.modules[key], f))
        if exact or f.scale == 2.0:
            assert torch.equal(update, wanted)
        torch.testing.assert_close(update, wanted, rtol=2e-7, atol=1e-6)
