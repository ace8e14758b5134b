"""Adapters as they are found in the field, each with what must come of it.

PEFT is the reference: what it computes from the folder that was written must be what it computes
from the same numbers under its own names.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from bdlora_megatron.convert import detect_format, open_adapter, read_adapter, write_adapter
from bdlora_megatron.convert.peft.reader import IGNORED_BY_PEFT
from bdlora_megatron.errors import AdapterFormatError, ConfigError
from tests.unit.convert.peft_files import COLUMN, ROW, peft_model, save, tiny_llama
from tests.unit.convert.peft_files import vanilla_tensors as tensors_of
from tests.unit.convert.peft_files import write as write_folder
from tests.unit.convert.random_adapters import assert_same

PEFT = "base_model.model."


def vanilla_tensors():
    """PEFT loads types that agree with its base model's, which is float32."""
    return tensors_of()


def write(folder, tensors=None, **config):
    """A folder that PEFT itself loads, if its tensors are named right."""
    usual = {"target_modules": COLUMN + ROW, "task_type": "CAUSAL_LM"}
    return write_folder(folder, tensors, **(usual | config))


def renamed(folder, rename, **config):
    tensors = {rename(name): tensor for name, tensor in vanilla_tensors().items()}
    return write(folder, tensors, **config)


def peft_updates(folder):
    """What PEFT computes from a folder on the tiny base model, by the module's path."""
    with warnings.catch_warnings():
        # A tensor that PEFT leaves out is a warning of its.
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(tiny_llama(), folder)
    return {
        name: layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@functools.cache
def wanted_updates(folder):
    return peft_updates(write(folder))


def refused(folder, **arguments):
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder, **arguments)
    return str(caught.value)


# --- names --------------------------------------------------------------------------------------


def inside(wrapper):
    """A wrapper round every block of a layer."""

    def rename(name):
        return name.replace(".self_attn.", f".{wrapper}.self_attn.").replace(
            ".mlp.", f".{wrapper}.mlp."
        )

    return rename


def named(adapter):
    def rename(name):
        return name.replace("lora_A.", f"lora_A.{adapter}.").replace(
            "lora_B.", f"lora_B.{adapter}."
        )

    return rename


#: How a trainer spells PEFT's names, and whether PEFT applies that spelling as it is.
SPELLINGS = {
    "pefts_own": (lambda n: n, True),
    "no_prefix": (lambda n: n.removeprefix(PEFT), False),
    "layers_only": (lambda n: n.removeprefix(f"{PEFT}model."), False),
    "half_a_prefix": (lambda n: n.removeprefix("base_model."), False),
    "no_model": (lambda n: n.replace(f"{PEFT}model.", PEFT), False),
    "default": (named("default"), True),
    "another_name": (named("poet"), False),
    "compiled": (lambda n: f"_orig_mod.{n}", False),
    "compiled_inside": (lambda n: n.replace(PEFT, f"{PEFT}_orig_mod."), False),
    "compiled_layers": (inside("_orig_mod"), False),
    "compiled_projections": (lambda n: n.replace(".lora_", "._orig_mod.lora_"), False),
    "checkpointed": (inside("_checkpoint_wrapped_module"), False),
    "fsdp": (lambda n: inside("_fsdp_wrapped_module")(f"_fsdp_wrapped_module.{n}"), False),
    "fsdp_and_more": (
        lambda n: inside("_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod")(n),
        False,
    ),
    "ddp": (lambda n: f"module.{n}", False),
    "deepspeed_in_ddp": (lambda n: f"module.module.{n}", False),
    "ddp_inside": (lambda n: n.replace(PEFT, f"{PEFT}module."), False),
    "lightning": (lambda n: f"model.{n}", False),
    "fabric": (lambda n: f"_forward_module.{n}", False),
    "value_head": (lambda n: f"pretrained_model.{n}", False),
    "peft_over_peft": (lambda n: f"{PEFT}{n}", False),
    "unheard_of": (inside("_streaming_wrapper"), False),
    "compiled_and_named": (lambda n: f"_orig_mod.module.{named('default')(n)}", False),
    "lightning_without_peft": (lambda n: n.replace(PEFT, "student."), False),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_is_read_and_written_as_peft_applies_it(case, tmp_path, caplog):
    rename, applied = SPELLINGS[case]
    folder = renamed(tmp_path / "case", rename)
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(folder)
    assert ("PEFT ignores 28 of its tensors" in caplog.text) is not applied
    assert adapter.metadata.get(IGNORED_BY_PEFT) == (None if applied else "28")
    assert_same(adapter, read_adapter(write(tmp_path / "own")))
    written = write_adapter(adapter, tmp_path / "written", "peft")
    assert set(load_file(written / "adapter_model.safetensors")) == set(vanilla_tensors())
    updates = peft_updates(written)
    for name, update in wanted_updates(tmp_path / "wanted").items():
        assert torch.equal(updates[name], update), name
        assert update.any()
    assert IGNORED_BY_PEFT not in read_adapter(written).metadata


@pytest.mark.parametrize("case", ["no_prefix", "compiled", "checkpointed", "default", "pefts_own"])
def test_what_is_said_of_pefts_names_is_true(case, tmp_path):
    rename, applied = SPELLINGS[case]
    folder = renamed(tmp_path / "case", rename)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama(), folder)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    live = [bool(layer.get_delta_weight("default").any()) for layer in layers]
    assert set(live) == {applied}


def test_modules_that_the_config_does_not_adapt_are_read_and_said(tmp_path, caplog):
    targets = ["q_proj", "mlp.up_proj", "layers.1.self_attn.k_proj"]
    folder = write(tmp_path / "case", target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_llama(), folder)
    applied = sum(isinstance(layer, LoraLayer) for layer in model.modules())
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(folder)
    assert adapter.metadata[IGNORED_BY_PEFT] == str(2 * (14 - applied)) == "18"
    assert "for their names or its target_modules" in caplog.text
    written = write_adapter(adapter, tmp_path / "written", "peft")
    updates = peft_updates(written)
    for name, update in wanted_updates(tmp_path / "wanted").items():
        assert torch.equal(updates[name], update), name
    for targets in ("all-linear", ".*q_proj", None):
        own = read_adapter(write(tmp_path / f"own{targets}", target_modules=targets))
        assert IGNORED_BY_PEFT not in own.metadata


@pytest.mark.parametrize(
    "prefix", ["language_model.model.", "model.language_model.", "model.text_model.", "llm.model."]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_language_model_in_a_larger_one_keeps_its_place(prefix, wrapped, tmp_path):
    def rename(name):
        # Its place is the base model's own, also where the name lacks PEFT's part.
        return name.replace(
            f"{PEFT}model.", f"_orig_mod.{prefix}" if wrapped else f"{PEFT}{prefix}"
        )

    adapter = read_adapter(renamed(tmp_path / "case", rename))
    written = write_adapter(adapter, tmp_path / "written", "peft")
    names = {name.replace(f"{PEFT}model.", f"{PEFT}{prefix}") for name in vanilla_tensors()}
    assert set(load_file(written / "adapter_model.safetensors")) == names


@pytest.mark.parametrize(("peft", "kept"), [(PEFT, PEFT), ("", PEFT)])
def test_a_model_without_a_head_keeps_its_layers_at_the_top(peft, kept, tmp_path):
    folder = renamed(
        tmp_path / "case",
        lambda n: n.replace(f"{PEFT}model.", peft),
        task_type="FEATURE_EXTRACTION",
    )
    written = write_adapter(read_adapter(folder), tmp_path / "written", "peft")
    names = {name.replace(f"{PEFT}model.", kept) for name in vanilla_tensors()}
    assert set(load_file(written / "adapter_model.safetensors")) == names


def test_a_dead_prefix_that_another_format_remembers_is_not_written(tmp_path):
    adapter = read_adapter(write(tmp_path / "case"))
    for prefix in ("", "_orig_mod.base_model.model.model.", "model.", "module.model."):
        adapter.metadata["peft_prefix"] = prefix
        written = write_adapter(adapter, tmp_path / f"to{prefix}", "peft")
        assert set(load_file(written / "adapter_model.safetensors")) == set(vanilla_tensors())


def test_several_adapters_in_one_file_are_refused_by_name(tmp_path):
    both = {}
    for adapter in ("poet", "bard"):
        both |= {named(adapter)(name): tensor for name, tensor in vanilla_tensors().items()}
    message = refused(write(tmp_path / "names", {n: t.clone() for n, t in both.items()}))
    assert "the file holds several adapters (bard, poet) and one config" in message
    twice = vanilla_tensors()
    twice |= {f"_orig_mod.{name}": tensor.clone() for name, tensor in twice.items()}
    assert "the same factor under two spellings" in refused(write(tmp_path / "twice", twice))


# --- configs ------------------------------------------------------------------------------------

HARMLESS = {
    "old_merge_weights": {"merge_weights": True, "enable_lora": None},
    "unsloth": {"unsloth_version": "2025.9.1", "transformers_version": "4.57.0"},
    "any_version": {"trl_version": "0.24.0", "our_own_version": 7},
    "swift": {"lora_dtype": "bfloat16", "lorap_lr_ratio": 16.0},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_options_of_other_tools_are_noted(case, tmp_path, caplog):
    folder = write(tmp_path / "case", **HARMLESS[case])
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(folder)
    assert_same(adapter, read_adapter(write(tmp_path / "own")))
    told = ", ".join(sorted(option for option, value in HARMLESS[case].items() if value))
    assert f"without options that change no update: {told}" in caplog.text


def test_unknown_options_are_read_only_when_ignored_by_name(tmp_path, caplog):
    folder = write(tmp_path / "case", brand_new=True, newer={"a": 1})
    message = refused(folder)
    assert "pass --ignore-unknown brand_new (ignore_unknown=)" in message
    assert "'newer' is an unknown option" in refused(folder, ignore_unknown=["brand_new"])
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(folder, ignore_unknown=["brand_new", "newer", "absent"])
    assert "without options that change no update: brand_new, newer" in caplog.text
    assert len(adapter.modules) == 14


@pytest.mark.parametrize("option", ["use_dora", "r", "lora_bias", "target_modules", "enable_lora"])
def test_known_options_cannot_be_ignored(option, tmp_path):
    with pytest.raises(ConfigError, match=f"{option} cannot be ignored"):
        read_adapter(write(tmp_path / "case", use_dora=True), ignore_unknown=[option])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"enable_lora": [True, False, True]}, "enable_lora is set: it adapts parts of a fused"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"peft_type": "lora"}, "peft_type is 'lora'"),
        ({"r": 16}, "the config says rank 16"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_bdlora": False}, "use_bdlora is False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_change_the_update_stay_refused(config, why, tmp_path):
    assert why in refused(write(tmp_path / "case", **config))


# --- contents -----------------------------------------------------------------------------------

FOREIGN = {
    "lm_head": ("lm_head.lora_A.weight", "LoRA on lm_head, the output layer"),
    "lm_head_base": ("lm_head.base_layer.weight", "LoRA on lm_head, the output layer"),
    "embedding": ("model.embed_tokens.lora_embedding_A", "LoRA on embed_tokens"),
    "resized": ("model.embed_tokens.weight", "save_embedding_layers=False"),
    "saved_head": ("lm_head.weight", "save_embedding_layers=False"),
    "classifier": ("score.weight", "whole weights of the base model (modules_to_save)"),
    "experts": (
        "model.layers.0.mlp.experts.3.up_proj.lora_A.weight",
        "would need a base model with experts",
    ),
    "shared_expert": (
        "model.layers.0.mlp.shared_expert.up_proj.lora_A.weight",
        "would need a base model with experts",
    ),
    "router": ("model.layers.0.mlp.gate.lora_A.weight", "factors of a router of experts"),
    "fused_qkv": (
        "model.layers.0.self_attn.query_key_value.lora_A.weight",
        "B's rows split by projection",
    ),
    "fused_other": ("model.layers.0.attn.Wqkv.lora_B.weight", "B's rows split by projection"),
    "tower": ("model.visual.blocks.0.attn.qkv.lora_A.weight", "of a vision or audio tower"),
    "named_bias": ("model.layers.0.mlp.up_proj.lora_B.default.bias", "biases of LoRA factors"),
    "other": ("model.layers.0.mlp.dense.lora_A.weight", "none of the seven projections"),
}


@pytest.mark.parametrize("wrapper", ["", "_orig_mod."])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_factor_is_refused_for_what_it_is(case, wrapper, tmp_path):
    name, why = FOREIGN[case]
    tensors = vanilla_tensors() | {f"{wrapper}{PEFT}{name}": torch.ones(8, 48)}
    message = refused(write(tmp_path / "case", tensors))
    assert why in message
    assert message.count("\n- ") == 1
    if "lm_head.lora" in name or "base_layer" in name:
        assert "modules_to_save" not in message


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def saved_with_embeddings(folder, **settings):
    model = peft_model(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, save_embedding_layers=True)
    return model


def test_embeddings_that_equal_the_bases_are_dropped(base, tmp_path, caplog):
    folder = tmp_path / "case"
    saved_with_embeddings(folder)
    assert "save_embedding_layers=False" in refused(folder)
    with caplog.at_level(logging.WARNING):
        adapter = read_adapter(folder, base_folder=base)
    assert f"equal the base model's: {PEFT}lm_head.weight, {PEFT}model.embed" in caplog.text
    plain = save(peft_model(), tmp_path / "plain")
    assert_same(adapter, read_adapter(plain))


def test_whole_weights_that_differ_from_the_bases_are_refused(base, tmp_path):
    folder = tmp_path / "case"
    saved_with_embeddings(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PEFT}lm_head.weight"][30, 3] += 1e-3
    save_file(tensors, path)
    message = refused(folder, base_folder=base)
    assert f"(in {PEFT}lm_head.weight)" in message
    # Rows that a resize added are in no base model.
    tensors[f"{PEFT}lm_head.weight"] = torch.cat(
        [tensors[f"{PEFT}lm_head.weight"], torch.ones(1, 48)]
    )
    save_file(tensors, path)
    assert f"(in {PEFT}lm_head.weight)" in refused(folder, base_folder=base)
    (tmp_path / "empty").mkdir()
    message = refused(folder, base_folder=tmp_path / "empty")
    assert "whole weights cannot be compared with the base model's" in message


def test_untrained_modules_to_save_and_other_types_are_dropped_too(base, tmp_path):
    folder = save(peft_model(modules_to_save=["lm_head"]), tmp_path / "case")
    assert "modules_to_save is set" in refused(folder)
    assert len(read_adapter(folder, base_folder=base).modules) == 14
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t if "lora" in n else t.bfloat16() for n, t in tensors.items()}, path)
    assert len(read_adapter(folder, base_folder=base).modules) == 14
    # Named in the config and not in the file: there is nothing to look at.
    named_alone = write(tmp_path / "named", modules_to_save=["lm_head"])
    assert "modules_to_save is set" in refused(named_alone, base_folder=base)


def test_tied_embeddings_are_found_under_their_one_name(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tensors = vanilla_tensors() | {f"{PEFT}lm_head.weight": model.lm_head.weight.detach().clone()}
    folder = write(tmp_path / "case", tensors)
    assert len(read_adapter(folder, base_folder=tmp_path / "base").modules) == 14


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_refused_with_the_cast_to_make(dtype, tmp_path):
    folder = write(tmp_path / "case", {n: t.to(dtype) for n, t in vanilla_tensors().items()})
    message = refused(folder)
    assert "but F8_E" in message
    assert "tensor.to(torch.bfloat16)" in message
    path = folder / "adapter_model.safetensors"
    # The cast that the message gives.
    save_file({name: t.to(torch.bfloat16) for name, t in load_file(path).items()}, path)
    assert len(read_adapter(folder).modules) == 14


# --- files and folders --------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("adapter_model.safetensors", LFS, "git lfs pull"),
        ("adapter_config.json", LFS, "git lfs pull"),
        ("adapter_model.safetensors", b"<!DOCTYPE html><html>", "it is a web page"),
    ],
)
def test_files_that_are_something_else_are_named(name, content, why, tmp_path):
    folder = write(tmp_path / "case")
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert why in message
    assert name in message


def test_a_pickle_that_is_a_pointer_or_empty_is_named(tmp_path):
    folder = write(tmp_path / "case")
    (folder / "adapter_model.safetensors").unlink()
    pickled = folder / "adapter_model.bin"
    pickled.write_bytes(LFS)
    assert "git lfs pull" in refused(folder)
    assert "git lfs pull" in refused(folder, allow_pickle=True)
    torch.save({}, pickled)
    assert "--allow-pickle (allow_pickle=True)" in refused(folder)
    assert "the file holds no tensors" in refused(folder, allow_pickle=True)


def test_mlx_shards_hub_caches_and_whole_models_are_named(tmp_path):
    mlx = write(tmp_path / "mlx", fine_tune_type="lora", lora_parameters={"rank": 8, "scale": 2.0})
    (mlx / "adapter_model.safetensors").rename(mlx / "adapters.safetensors")
    assert "it is an adapter of MLX" in refused(mlx)
    (mlx / "adapter_config.json").unlink()
    assert "it is an adapter of MLX" in refused(mlx)
    shards = write(tmp_path / "shards")
    (shards / "adapter_model.safetensors").unlink()
    (shards / "adapter_model.safetensors.index.json").write_text("{}")
    assert "in the shards that adapter_model.safetensors.index.json lists" in refused(shards)
    cached = tmp_path / "hub" / "models--acme--poet"
    for revision in ("old", "new"):
        write_to = cached / "snapshots" / revision
        write_to.parent.mkdir(parents=True, exist_ok=True)
        write(write_to)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("new\n")
    for folder in (cached, tmp_path / "hub"):
        message = refused(folder)
        assert f"pass {cached}/snapshots/new or {cached}/snapshots/old" in message
    assert detect_format(cached / "snapshots" / "new") == "peft"
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    assert "it is a whole model" in refused(model)


def test_an_open_adapter_names_what_it_is_made_of(tmp_path):
    with open_adapter(renamed(tmp_path / "case", SPELLINGS["compiled"][0])) as adapter:
        assert adapter.metadata["peft_prefix"] == f"{PEFT}model."
    raw = json.loads((tmp_path / "case" / "adapter_config.json").read_text())
    assert raw["task_type"] == adapter.metadata["task_type"]
