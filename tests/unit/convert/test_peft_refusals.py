"""What is refused of PEFT's adapters, by name and all at once."""

from __future__ import annotations

import json
import math
import os
import pickle
import time

import pytest
import torch
from peft import (
    AdaLoraConfig,
    ArrowConfig,
    IA3Config,
    LoftQConfig,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.config import CordaConfig, KasaConfig, MontecloraConfig
from safetensors.torch import save_file

from bdlora_megatron.convert import read_peft
from bdlora_megatron.convert.peft.config import parse_peft_config
from bdlora_megatron.errors import AdapterFormatError
from tests.unit.convert.peft_files import (
    COLUMN,
    HIDDEN,
    ROW,
    blocks,
    peft_model,
    save,
    tiny_llama,
    vanilla_tensors,
    write,
)

Q0 = "base_model.model.model.layers.0.self_attn.q_proj."


def refused(folder, **arguments):
    with pytest.raises(AdapterFormatError) as caught:
        read_peft(folder, **arguments)
    return str(caught.value)


# --- made by the installed PEFT -----------------------------------------------------------------

MADE = {
    "dora": ({"use_dora": True}, ["use_dora is set", "DoRA magnitudes", "and 10 more"]),
    "lora_bias": ({"lora_bias": True}, ["lora_bias is set", "biases of LoRA factors"]),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        ["modules_to_save is set", "whole weights of the base model"],
    ),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        ["LoRA on embed_tokens", "lora_embedding_A"],
    ),
    "lm_head": (
        {"target_modules": ["q_proj", "lm_head"]},
        ["LoRA on lm_head", "lm_head.lora_A.weight"],
    ),
    "token_indices": (
        {"trainable_token_indices": [3, 4]},
        ["trainable_token_indices is set", "replaced embedding rows"],
    ),
    "base_biases": (
        {"bias": "all", "base": {"attention_bias": True}},
        ["biases of the base model", "self_attn.q_proj"],
    ),
    "lora_only_biases": (
        {"bias": "lora_only", "base": {"attention_bias": True}},
        ["biases of the base model", "self_attn.q_proj"],
    ),
    "target_parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
        ["target_parameters is set", "fused expert weights"],
    ),
    "kasa": (
        {"kasa_config": KasaConfig()},
        ["kasa_config is set", "KaSA diagonals", "lora_diag"],
    ),
    "monteclora": (
        {"monteclora_config": MontecloraConfig()},
        ["monteclora_config is set", "tensors of an unknown kind"],
    ),
    "qalora": ({"use_qalora": True}, ["use_qalora is set"]),
    "pissa": ({"init_lora_weights": "pissa"}, ["'pissa'", "path_initial_model_for_weight"]),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_2"}, ["'pissa_niter_2'"]),
    "olora": ({"init_lora_weights": "olora"}, ["'olora'", "changed the base weights"]),
    "layer_replication": (
        {"layer_replication": [(0, 2), (1, 2)]},
        ["layer_replication is set", "build that base model first"],
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_what_peft_saves_beyond_plain_factors_is_refused(case, tmp_path):
    settings, wanted = MADE[case]
    message = refused(save(peft_model(**settings), tmp_path / case))
    assert message.startswith(f"cannot read the PEFT adapter in {tmp_path / case}:\n- ")
    for part in wanted:
        assert part in message


OTHER_KINDS = {
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ADALORA": AdaLoraConfig(total_step=10, target_modules=["q_proj"]),
    "LOHA": LoHaConfig(target_modules=["q_proj"]),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_adapters_are_refused(kind, tmp_path):
    model = get_peft_model(tiny_llama(), OTHER_KINDS[kind])
    message = refused(save(model, tmp_path / kind))
    assert f'peft_type is {kind!r}, wanted "LORA"' in message


#: Trained with packages that are not here; PEFT writes the config, and the tensors are plain.
CONFIGS = {
    "arrow": ({"arrow_config": ArrowConfig(top_k=1)}, "routes between adapters"),
    "corda": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "'corda'"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}, "'loftq'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_peft_writes_for_other_methods_are_refused(case, tmp_path):
    settings, wanted = CONFIGS[case]
    folder = write(tmp_path / case)
    config = LoraConfig(r=8, target_modules=COLUMN + ROW, inference_mode=True)
    for name, value in settings.items():
        # The constructor asks whether the packages are there.
        setattr(config, name, value)
    config.save_pretrained(folder)
    assert wanted in refused(folder)


# --- written by hand ----------------------------------------------------------------------------

OPTIONS = {
    "target_parameters": (["mlp.experts.down_proj"], "fused expert weights"),
    "arrow_config": ({"top_k": 2}, "routes between adapters"),
    "kasa_config": ({"beta": 1.0}, "adds a diagonal"),
    "monteclora_config": ({"num_samples": 2}, "samples the factors"),
    "use_qalora": (True, "pools the input"),
    "init_lora_weights": ("loftq", "train from another initialisation"),
    "peft_type": ("ADALORA", 'wanted "LORA"'),
    "brand_new_option": (0.5, "is an unknown option and may change the update"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_more_than_the_update_are_refused(option, tmp_path):
    value, why = OPTIONS[option]
    message = refused(write(tmp_path / option, **{option: value}))
    assert option in message
    assert why in message
    assert message.count("\n- ") == 1


def test_an_unknown_initialisation_is_refused(tmp_path):
    assert "'magic', which is unknown" in refused(write(tmp_path / "a", init_lora_weights="magic"))


def test_an_unknown_option_that_is_unset_is_let_pass(tmp_path):
    assert len(read_peft(write(tmp_path / "newer", brand_new_option=None)).modules) == 14


def test_all_problems_are_told_at_once(tmp_path):
    tensors = vanilla_tensors()
    del tensors[Q0 + "lora_B.weight"]
    tensors["base_model.model.lm_head.weight"] = torch.zeros(3)
    tensors["base_model.model.model.norm.odd"] = torch.zeros(3)
    tensors[Q0.replace("q_proj", "v_proj") + "lora_A.weight"] = torch.zeros(7, HIDDEN)
    tensors[Q0.replace("q_proj", "k_proj") + "lora_A.weight"] = torch.zeros(8, HIDDEN + 1)
    message = refused(write(tmp_path / "bad", tensors, use_dora=True, kasa_config={"beta": 1}))
    assert message.count("\n- ") == 7
    for part in (
        "use_dora is set",
        "kasa_config is set",
        "lora_B is missing; copy or save the adapter again (in layers.0.self_attn.q_proj)",
        "whole weights of the base model",
        "tensors of an unknown kind",
        f"lora_A has shape [7, {HIDDEN}], but the config says rank 8",
        f"hidden_size is {HIDDEN} by layers.0.mlp.down_proj but {HIDDEN + 1} by",
    ):
        assert part in message


def test_a_missing_down_projection_is_refused(tmp_path):
    tensors = vanilla_tensors()
    del tensors[Q0 + "lora_A.weight"]
    assert "lora_A is missing" in refused(write(tmp_path / "a", tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_not_finite_are_refused(factor, value, tmp_path):
    tensors = vanilla_tensors()
    tensors[f"{Q0}lora_{factor}.weight"][3, 5] = value
    message = refused(write(tmp_path / "a", tensors))
    assert "factors hold NaN or infinity" in message
    assert "(in layers.0.self_attn.q_proj)" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_factors_that_are_no_plain_floats_are_refused(dtype, tmp_path):
    tensors = vanilla_tensors()
    tensors[Q0 + "lora_A.weight"] = tensors[Q0 + "lora_A.weight"].to(dtype)
    assert "factors are no F64, F32, F16 or BF16" in refused(write(tmp_path / "a", tensors))


def test_factors_of_two_dtypes_are_refused(tmp_path):
    tensors = vanilla_tensors()
    tensors[Q0 + "lora_A.weight"] = tensors[Q0 + "lora_A.weight"].half()
    message = refused(write(tmp_path / "a", tensors))
    assert "factor A is torch.float16 and factor B is torch.float32" in message


def test_blocks_that_the_tensors_do_not_have_are_refused(tmp_path):
    bd = {"nblocks": 4, "target_modules_bd_a": ROW, "target_modules_bd_b": COLUMN}
    message = refused(write(tmp_path / "vanilla", use_bdlora=bd))
    assert 'do not fit blocked="B", num_blocks=4' in message
    # A packed A looks like that of a wider module; only the other modules can tell.
    assert "the modules are not those of one base model" not in message
    only = {"nblocks": 4, "target_modules_bd_a": ["o_proj"], "match_strict": False}
    message = refused(write(tmp_path / "row", use_bdlora=only))
    assert "q_size is 320 by layers.0.self_attn.o_proj but 80 by" in message


def test_blocks_missing_from_the_config_are_refused(tmp_path):
    folder = save(peft_model(use_bdlora=blocks(2)), tmp_path / "bd")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_bdlora": None}))
    message = refused(folder)
    assert 'do not fit blocked="B", num_blocks=1' in message


def test_modules_that_both_lists_or_neither_name_are_refused(tmp_path):
    both = {"nblocks": 1, "target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_proj"]}
    message = refused(write(tmp_path / "both", use_bdlora=both))
    assert "both in target_modules_bd_a and in target_modules_bd_b" in message
    assert "(in layers.0.self_attn.q_proj, layers.1.self_attn.q_proj)" in message
    neither = {"nblocks": 1, "target_modules_bd_a": ROW}
    message = refused(write(tmp_path / "neither", use_bdlora=neither))
    assert "neither in target_modules_bd_a nor in target_modules_bd_b" in message


def test_two_stacks_of_layers_are_refused(tmp_path):
    tensors = vanilla_tensors()
    other = {n.replace(".model.layers", ".draft.layers"): t.clone() for n, t in tensors.items()}
    message = refused(write(tmp_path / "two", tensors | other))
    assert "several stacks of layers" in message
    assert "(in draft., model.)" in message


@pytest.mark.parametrize("part", ["encoder", "vision_tower", "audio_tower"])
def test_encoders_are_refused(part, tmp_path):
    tensors = {
        n.replace(".model.layers", f".{part}.layers"): t for n, t in vanilla_tensors().items()
    }
    assert "no language decoder's" in refused(write(tmp_path / "a", tensors))


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.up_proj.lora_A.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.query_key_value.lora_A.weight",
        "base_model.model." + "deep." * 30 + "layers.0.self_attn.q_proj.lora_A.weight",
    ],
    ids=["expert", "misplaced", "leading-zero", "fused", "too-long"],
)
def test_factors_of_other_modules_are_refused(name, tmp_path):
    message = refused(write(tmp_path / "a", vanilla_tensors() | {name: torch.ones(8, HIDDEN)}))
    assert "none of the seven projections" in message
    # A name of any length must not fill the screen.
    assert name[:100] in message


@pytest.mark.parametrize("module", ["q_a_proj", "kv_a_proj_with_mqa"])
def test_replicated_down_projections_are_refused(module, tmp_path):
    name = f"base_model.model.model.layers.0.self_attn.{module}.lora_A.weight"
    message = refused(write(tmp_path / "a", vanilla_tensors() | {name: torch.ones(8, HIDDEN)}))
    assert "factors of latent attention's down-projections" in message
    assert name in message


def test_names_with_control_characters_are_shown_escaped(tmp_path):
    message = refused(write(tmp_path / "a", vanilla_tensors() | {"x\n\x1b[2J": torch.ones(1)}))
    assert r"'x\n\x1b[2J'" in message
    assert "\x1b" not in message


def test_an_adapter_without_factors_is_refused(tmp_path):
    assert "there are no factors of decoder layers" in refused(write(tmp_path / "empty", {}))


# --- malformed configs --------------------------------------------------------------------------

MALFORMED = {
    "r": [
        (0, "a positive integer"),
        ("8", "a positive"),
        (True, "a positive"),
        (8.0, "a positive"),
    ],
    "lora_alpha": [(math.nan, "a finite number"), (None, "a finite"), (math.inf, "a finite")],
    "rank_pattern": [
        ([4], "an object"),
        ({"q_proj": 0}, "a positive integer"),
        ({"(": 4}, "regular"),
    ],
    "alpha_pattern": [({"q_proj": "2"}, "a finite number"), ({"[": 4}, "no regular expression")],
    "use_rslora": [("yes", "wanted true or false")],
    "use_bdlora": [
        (True, "wanted null or an object"),
        ({"nblocks": 0}, "use_bdlora.nblocks is 0, wanted a positive integer"),
        ({"target_modules_bd_a": "o_proj"}, "wanted a list of strings"),
        ({"target_modules_bd_b": [1]}, "wanted a list of strings"),
        ({"match_strict": 1}, "wanted a boolean"),
        ({"nblock": 2}, "unknown option 'nblock'"),
    ],
}


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [(option, value, wanted) for option, cases in MALFORMED.items() for value, wanted in cases],
    ids=str,
)
def test_malformed_options_are_refused_by_name(option, value, wanted):
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, option: value}
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is malformed") as caught:
        parse_peft_config(raw)
    assert option in str(caught.value)
    assert wanted in str(caught.value)


def test_all_malformed_options_are_told_at_once():
    with pytest.raises(AdapterFormatError) as caught:
        parse_peft_config({"r": -1, "lora_alpha": "x", "use_bdlora": 3})
    assert str(caught.value).count("\n- ") == 3


#: Each of them could match for years in an engine that backtracks without a limit.
_SLOW = {
    "nested": "(.*)*x",
    "alternatives": "(a|aa)+x",
    "choices": "(.|.)" * 20 + "x",
    "optionals": ".?" * 30 + "x",
    "stars": ".*" * 20 + "x",
    "digits": r"(\w|.|\.|[a-z])+\d\d\d",
}


@pytest.mark.parametrize("case", _SLOW)
def test_a_pattern_takes_no_longer_than_its_time_limit(case, tmp_path):
    folder = write(tmp_path / "a", rank_pattern={_SLOW[case]: 4})
    start = time.monotonic()
    # None of them ends a path of these modules, if it comes to that.
    try:
        outcome = {factors.rank for factors in read_peft(folder).modules.values()}
    except AdapterFormatError as error:
        outcome = "takes too long; name the modules more plainly" in str(error)
    assert outcome in ({8}, True)
    assert time.monotonic() - start < 20


def test_a_pattern_of_endless_length_is_refused(tmp_path):
    message = refused(write(tmp_path / "a", rank_pattern={"a" * 70_000: 8}))
    assert "has 70000 characters, more than 65536" in message
    assert len(message) < 1000


# --- files --------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path):
    assert "holds no adapter_config.json" in refused(tmp_path)
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds a JSON list"),
        ("[" * 100_000, "is no JSON"),
        ("\xff", "no"),
    ],
    ids=["cut", "list", "deep", "not-utf8"],
)
def test_a_broken_config_is_refused(text, why, tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text, "latin-1")
    assert why in refused(folder)


def test_broken_safetensors_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refused(folder)


class _RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("was-run",))


def test_pickles_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    file = folder / "adapter_model.bin"
    file.write_bytes(pickle.dumps(_RunsCode()))
    assert "--allow-pickle (allow_pickle=True)" in refused(folder)
    assert "cannot be read as tensors alone" in refused(folder, allow_pickle=True)
    torch.save({"x": _RunsCode()}, file)
    assert "cannot be read as tensors alone" in refused(folder, allow_pickle=True)
    torch.save({"step": 3}, file)
    assert "holds more than named tensors" in refused(folder, allow_pickle=True)
    assert not (tmp_path / "was-run").exists()


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    folder = write(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(_RunsCode()))
    assert len(read_peft(folder, allow_pickle=True).modules) == 14
    save_file({}, folder / "adapter_model.safetensors")
    assert "no factors" in refused(folder, allow_pickle=True)
