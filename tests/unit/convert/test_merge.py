"""`bdlora merge`: transformers computes of the merged folder what PEFT does of base and adapter."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bdlora_megatron.convert import open_adapter, read_adapter, write_adapter
from bdlora_megatron.convert.adapter import ModuleKey
from bdlora_megatron.convert.merge import merge_adapter
from tests.golden.peft_cases import COLUMN, ROW
from tests.harness import run_ranks
from tests.reference import dense_update
from tests.tolerances import assert_close
from tests.train.runs import VOCAB, make_base
from tests.unit.cli.adapters import run, run_json

LORAS = {
    "vanilla": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"down_proj": 3}},
    "bd": {
        "r": 12,
        "lora_alpha": 6,
        "use_rslora": True,
        "use_bdlora": BdLoraConfig(nblocks=6, target_modules_bd_a=ROW, target_modules_bd_b=COLUMN),
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Untied in float32; tied, in several files and bfloat16."""
    root = tmp_path_factory.mktemp("merge")
    make_base(root / "float32")
    make_base(root / "tied", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(root / "tied", dtype=torch.bfloat16)
    model.save_pretrained(root / "bfloat16", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "bfloat16" / name).write_bytes((root / "float32" / name).read_bytes())
    (root / "bfloat16" / "LICENSE").write_text("any")
    (root / "bfloat16" / "original").mkdir()
    (root / "bfloat16" / "pytorch_model.bin").write_bytes(b"old")
    return root


@pytest.fixture(scope="module")
def adapters(bases):
    for name, options in LORAS.items():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(bases / "float32", dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(target_modules=COLUMN + ROW, **options))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(bases / "adapters" / name)
    return bases / "adapters"


@torch.no_grad()
def _logits(folder, dtype, adapter=None):
    """In float64, after PEFT has merged in the base's own type."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ids = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
    return model.double().eval()(ids).logits


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_the_merged_model_is_pefts(bases, adapters, tmp_path, capsys, base, lora):
    folder, out = bases / base, tmp_path / "merged"
    arguments = ["--base", folder, "--adapter", adapters / lora, "--out", out]
    status, told = run_json(capsys, "merge", *arguments)
    assert (status, told["dtypes"], len(told["modules"])) == (0, [base], 14)
    dtype = getattr(torch, base)
    wanted = _logits(folder, dtype, adapters / lora)
    plain = _logits(folder, dtype)
    assert (wanted - plain).abs().max() > 0.1 * plain.abs().max()
    # PEFT rounds the update and the sum, we the sum alone.
    tolerance = {"float32": (1e-6, 1e-5), "bfloat16": (3e-2, 1e-1)}[base]
    assert_close(_logits(out, dtype), wanted, "the merged model's logits", tolerance)
    _check_weights(folder, out, read_adapter(adapters / lora), told, dtype)
    left = ["original", "pytorch_model.bin"] if base == "bfloat16" else []
    assert told["left_out"] == left
    theirs = {path.name for path in folder.iterdir()} - set(left)
    assert {path.name for path in out.iterdir()} == theirs
    for name in theirs:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (folder / name).read_bytes(), name


def _check_weights(folder, out, adapter, told, dtype):
    """Every weight, in fp64 and rounded once; what was told of the rounding is so."""
    before, after = (
        {
            name: tensor
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for path in (folder, out)
    )
    assert before.keys() == after.keys()
    updates = {
        f"model.{key}.weight": dense_update(f, dtype=torch.float64)
        for key, f in adapter.modules.items()
    }
    errors = {f"model.{module['key']}.weight": module["error"] for module in told["modules"]}
    lost = norms = 0.0
    for name, tensor in before.items():
        if name not in updates:
            assert torch.equal(after[name], tensor), name
            continue
        whole = tensor.double() + updates[name]
        assert after[name].dtype == dtype
        assert_close(after[name].double(), whole.to(dtype).double(), name, (1e-9, 1e-3))
        loss = (after[name].double() - whole).norm()
        assert errors[name] == pytest.approx((loss / updates[name].norm()).item(), rel=1e-3)
        lost, norms = lost + loss.square(), norms + updates[name].norm().square()
    assert told["error"] == pytest.approx((lost / norms).sqrt().item(), rel=1e-3)
    assert told["worst"] == max(told["modules"], key=lambda module: module["error"])["key"]
    assert told["error"] > (1e-3 if dtype is torch.bfloat16 else 1e-9)


def test_the_report_for_people(bases, adapters, tmp_path, capsys):
    arguments = ["--base", bases / "bfloat16", "--adapter", adapters / "bd"]
    status, out, _ = run(capsys, "merge", *arguments, "--out", tmp_path / "merged")
    assert status == 0
    assert "worst: layers." in out
    assert f"left out of {bases / 'bfloat16'}: original, pytorch_model.bin" in out
    assert out.endswith(f"14 modules merged in bfloat16; the model is in {tmp_path / 'merged'}\n")


def test_what_does_not_fit_is_refused_and_nothing_is_written(bases, adapters, tmp_path, capsys):
    make_base(tmp_path / "wide", intermediate_size=72)
    make_base(tmp_path / "torn")
    config = tmp_path / "torn" / "config.json"
    tensors = load_file(tmp_path / "torn" / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "torn" / "model.safetensors", {"format": "pt"})
    assert json.loads(config.read_text())["num_hidden_layers"] == 2
    out = tmp_path / "merged"
    named = ["--adapter", adapters / "bd", "--out", out]
    for base, wanted in (
        ("wide", "ffn_size is 60 in the adapter and 72 in the base model"),
        ("torn", "model.layers.1.self_attn.q_proj.weight is not there in the base model"),
    ):
        status, _, error = run(capsys, "merge", "--base", tmp_path / base, *named)
        assert status == 2
        assert wanted in error
    status, _, error = run(capsys, "merge", *named)
    assert "merge needs --base" in error
    out.mkdir()
    (out / "kept").write_text("mine")
    status, _, error = run(capsys, "merge", "--base", bases / "float32", *named)
    assert (status, (out / "kept").read_text()) == (2, "mine")
    assert "is there already" in error
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_sum_beyond_half_precision_is_refused(bases, adapters, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(bases / "float32", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(65504.0)
    model.save_pretrained(tmp_path / "half")
    named = ["--base", tmp_path / "half", "--adapter", adapters / "bd", "--out", tmp_path / "out"]
    factors = read_adapter(adapters / "bd")
    key = ModuleKey(layer=0, name="down_proj")
    big = {"B": factors.modules[key].B * 1e4}
    changed = type(factors.modules[key])
    made = changed(
        A=factors.modules[key].A,
        num_blocks=6,
        blocked="A",
        scale=factors.modules[key].scale,
        **big,
    )
    loud = type(factors)(name="loud", modules={**factors.modules, key: made})
    named[3] = write_adapter(loud, tmp_path / "loud", "peft")
    status, _, error = run(capsys, "merge", *named)
    assert status == 2
    assert "layers.0.mlp.down_proj: base and update together exceed the range of" in error
    assert not (tmp_path / "out").exists()


def _rise(rank, world_size, base, adapter, out):
    """By how many bytes a merge raises the peak of a fresh process's resident memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_adapter(adapter) as opened:
        merge_adapter(base, opened, out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    sizes = {"hidden_size": 504, "intermediate_size": 4096, "num_hidden_layers": 12}
    base = make_base(tmp_path / "base", **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    options = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    get_peft_model(model.to_empty(device="cpu"), options).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: torch.full_like(tensor, 0.01) for name, tensor in tensors.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    (rise,) = run_ranks(1, _rise, base, tmp_path / "adapter", tmp_path / "out")
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    # A weight has 8 MB, and what is in float64 at once some 8 MB each.
    assert file > 290e6
    assert rise < 120e6
