"""Written PEFT adapters: bit-equal when read again, and the same function in the installed PEFT."""

from __future__ import annotations

import json
import logging
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from bdlora_megatron.convert import ModuleKey, WriteOptions, read_peft, write_adapter
from bdlora_megatron.convert.adapter.scale import choose_alphas, peft_scale
from bdlora_megatron.convert.tensor_files import write_safetensors
from bdlora_megatron.errors import ShapeError, UnsupportedError
from tests.tolerances import assert_close
from tests.unit.convert.peft_files import peft_model, save, tiny_llama
from tests.unit.convert.random_adapters import adapter, adapters, assert_same, factors
from tests.unit.convert.test_peft_reader import CASES


def loaded(folder, cls, **base):
    with warnings.catch_warnings():
        # A missing or a surplus tensor is a warning of PEFT's.
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(tiny_llama(cls, **base), folder)


@torch.no_grad()
def output(model):
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(3))
    return model.eval().double()(ids)[0]


@pytest.mark.parametrize("dense", [False, True], ids=["blocks", "dense"])
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"bfloat16"}))
def test_peft_gives_the_same_logits_from_the_written_adapter(case, dense, tmp_path):
    model = peft_model(**CASES[case])
    original = read_peft(save(model, tmp_path / "original"))
    options = WriteOptions(dense=dense)
    folder = write_adapter(original, tmp_path / "written", "peft", options=options)
    again = loaded(folder, type(model.base_model.model))
    assert_close(output(again), output(model), case)
    if not dense:
        assert_same(read_peft(folder), original)
        assert torch.equal(output(again), output(model)) or "swapped" in case
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert [name for name, _ in again.named_parameters() if "lora_A" in name] == adapted


@given(wanted=adapters())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trips_are_bit_equal(wanted, tmp_path_factory):
    folder = write_adapter(wanted, tmp_path_factory.mktemp("trip") / "a", "peft")
    got = read_peft(folder)
    assert_same(got, wanted)
    # safetensors' own loader agrees with ours, and finds every tensor aligned.
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, factor in wanted.modules.items():
        assert torch.equal(tensors[f"base_model.model.model.{key}.lora_A.weight"], factor.A)
        assert torch.equal(tensors[f"base_model.model.model.{key}.lora_B.weight"], factor.B)
    again = write_adapter(got, folder.parent / "b", "peft")
    file = "adapter_model.safetensors"
    assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_mixed_types_come_back_and_stay_aligned(tmp_path):
    kinds = {"q_proj": torch.bfloat16, "k_proj": torch.float64, "up_proj": torch.float32}
    modules = {
        ModuleKey(layer=0, name=name): factors(name, rank=1, dtype=dtype)
        for name, dtype in kinds.items()
    }
    folder = write_adapter(adapter(modules), tmp_path / "mixed", "peft")
    assert_same(read_peft(folder), adapter(modules))
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        order = [file.get_tensor(name).itemsize for name in file.offset_keys()]
    assert order == sorted(order, reverse=True)


def test_the_pattern_entries_are_as_few_as_the_modules_need(tmp_path):
    modules = {}
    for layer in range(4):
        for name in ("q_proj", "o_proj", "up_proj"):
            rank = 4 if name == "o_proj" else 16 if (layer, name) == (2, "q_proj") else 8
            modules[ModuleKey(layer=layer, name=name)] = factors(name, rank=rank, scale=12 / rank)
    folder = write_adapter(adapter(modules), tmp_path / "a", "peft")
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["r"] == 8
    assert raw["rank_pattern"] == {"layers.2.self_attn.q_proj": 16, "o_proj": 4}
    assert (raw["lora_alpha"], raw["alpha_pattern"]) == (12, {})
    assert raw["target_modules"] == ["q_proj", "o_proj", "up_proj"]
    assert raw["use_bdlora"] is None
    assert_same(read_peft(folder), adapter(modules))


def test_several_block_counts_are_refused_unless_dense(tmp_path):
    modules = {
        ModuleKey(layer=0, name="q_proj"): factors("q_proj", rank=8, num_blocks=2),
        ModuleKey(layer=0, name="k_proj"): factors("k_proj", rank=8, num_blocks=4),
    }
    with pytest.raises(UnsupportedError, match=r"modules have 2, 4 blocks.*dense=True"):
        write_adapter(adapter(modules), tmp_path / "a", "peft")
    assert list(tmp_path.iterdir()) == []
    folder = write_adapter(
        adapter(modules), tmp_path / "a", "peft", options=WriteOptions(dense=True)
    )
    assert {f.num_blocks for f in read_peft(folder).modules.values()} == {1}


def test_the_base_models_name_is_kept_or_replaced(tmp_path):
    original = adapter(
        {ModuleKey(layer=0, name="q_proj"): factors("q_proj", rank=8)},
        base_model_name_or_path="some/base",
    )
    kept = read_peft(write_adapter(original, tmp_path / "a", "peft"))
    assert kept.metadata["base_model_name_or_path"] == "some/base"
    options = WriteOptions(base_model="other/base")
    named = read_peft(write_adapter(original, tmp_path / "b", "peft", options=options))
    assert named.metadata["base_model_name_or_path"] == "other/base"


# --- scales -------------------------------------------------------------------------------------


@given(
    alphas=st.dictionaries(
        st.integers(1, 512), st.floats(-1e6, 1e6).filter(lambda x: abs(x) > 1e-6), min_size=1
    ),
    use_rslora=st.booleans(),
)
@settings(deadline=None)
def test_every_scale_that_peft_can_compute_comes_back(alphas, use_rslora):
    pairs = {(r, peft_scale(alpha, r, use_rslora=use_rslora)) for r, alpha in alphas.items()}
    chosen, found = choose_alphas(pairs)
    for rank, scale in pairs:
        assert peft_scale(found[rank, scale], rank, use_rslora=chosen) == scale


@given(rank=st.integers(1, 512), scale=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_any_other_scale_is_met_to_the_last_place(rank, scale):
    use_rslora, alphas = choose_alphas({(rank, scale)})
    got = peft_scale(alphas[rank, scale], rank, use_rslora=use_rslora)
    assert abs(got - scale) <= math.ulp(scale)


def test_a_scale_that_cannot_be_written_exactly_is_told(tmp_path, caplog):
    def reached(scale):
        use_rslora, alphas = choose_alphas({(3, scale)})
        return peft_scale(alphas[3, scale], 3, use_rslora=use_rslora) == scale

    # No float64 divided by 3 or by its root is this number.
    unreachable = next(s for s in (1.9 + n * 2.0**-52 for n in range(100)) if not reached(s))
    key = ModuleKey(layer=0, name="q_proj")
    odd = adapter({key: factors("q_proj", rank=3, scale=unreachable)})
    with caplog.at_level(logging.WARNING):
        folder = write_adapter(odd, tmp_path / "a", "peft")
    assert "the scale of 1 modules of adapter 'random', such as layers.0" in caplog.text
    assert abs(read_peft(folder).modules[key].scale - unreachable) <= math.ulp(unreachable)


# --- the file -----------------------------------------------------------------------------------


def test_the_file_takes_what_was_announced_and_nothing_else(tmp_path):
    facts = {"a": torch.empty(2, device="meta"), "b": torch.empty(3, device="meta")}
    with (
        pytest.raises(ShapeError, match=r"got tensor b .*wanted a"),
        write_safetensors(tmp_path / "1", facts) as write,
    ):
        write("b", torch.zeros(3))
    with (
        pytest.raises(ShapeError, match=r"got tensor a \(\[3\]"),
        write_safetensors(tmp_path / "2", facts) as write,
    ):
        write("a", torch.zeros(3))
    with (
        pytest.raises(ShapeError, match="tensor b was announced"),
        write_safetensors(tmp_path / "3", facts) as write,
    ):
        write("a", torch.zeros(2))
