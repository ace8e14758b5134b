"""More ranks than key-value heads: each rank serves whole heads, and its own blocks of them."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import transformers
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from peft import PeftModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdlora_megatron import runtime
from bdlora_megatron.config import Layout, LoRAConfig
from bdlora_megatron.convert import (
    check_base,
    load_hf_model,
    read_hf_config,
    read_peft,
)
from bdlora_megatron.convert.structure import choices_for_tp
from bdlora_megatron.errors import BDLoRAError, ConfigError, UnsupportedError
from bdlora_megatron.export import save_adapter
from bdlora_megatron.layers import (
    LoadOptions,
    apply_lora,
    collect_adapter,
    load_adapter,
    lora_layers,
)
from bdlora_megatron.models import transformer_config
from bdlora_megatron.models.check import base_shape
from bdlora_megatron.plan import HARDWARE
from bdlora_megatron.plan.deployment import Deployment, make_plan
from bdlora_megatron.plan.memory import adapter_bytes
from bdlora_megatron.plan.work import AdapterLoad
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.versions.layers import shares_kv_heads
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine import EngineOptions, ServingEngine
from bdlora_megatron.serve.messages import Sampling, Submit
from tests.golden.peft_cases import KINDS, blocks, make_adapter, make_base
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.engine_cases import run
from tests.tp.session import model_parallel

TP, HEADS, HEAD_DIM = 8, 8, 8
#: Blocks of one head, of an eighth of one, and of two heads where there are four.
ADAPTERS = {
    "vanilla": KINDS["vanilla"],
    "two": KINDS["bdlora2"],
    "eight": {"r": 8, "lora_alpha": 16, "use_bdlora": blocks(8)},
    "patterns": KINDS["patterns"],
}


def _base(root, kv_heads, **changes):
    sizes = {"num_key_value_heads": kv_heads, "head_dim": HEAD_DIM, **changes}
    return make_base(root / "base", family="Qwen2", **{"num_attention_heads": HEADS, **sizes})


# --- one layer, on each of eight ranks that are not there ----------------------------------------


@torch.no_grad()
def _peft_qkv(root, name, x):
    """q, k and v of the first layer as PEFT computes them, ``[T, heads, head_dim]`` each."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float64)
    if name is not None:
        model = PeftModel.from_pretrained(model, root / name).double()
    layer = model.get_submodule(
        "model.layers.0.self_attn" if name is None else "base_model.model.model.layers.0.self_attn"
    )
    return [getattr(layer, f"{which}_proj")(x).unflatten(-1, (-1, HEAD_DIM)) for which in "qkv"]


def _on_each_rank(rank, world_size, root, kv_heads):
    torch.manual_seed(3)
    x = torch.randn(5, 48, dtype=torch.float64)
    by_name = {name: _peft_qkv(root, name, x) for name in (None, *ADAPTERS)}
    runtime.enable_cpu()
    for tp_rank in range(TP):
        torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=tp_rank, world_size=TP)
        # Groups of gloo's would wait for ranks that are not there.
        parallel_state.initialize_model_parallel(TP, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        model = load_hf_model(root / "base", dtype=torch.float64, for_serving=True).eval()
        for name, wanted in by_name.items():
            for layout in Layout if name == "vanilla" else [Layout.BDLORA]:
                if layout is Layout.SLORA:
                    # Its ranks exchange what is not there.
                    continue
                if name is not None:
                    load_adapter(model, read_peft(root / name), LoadOptions(layout=layout))
                linear = model.decoder.layers[0].self_attention.linear_qkv
                with torch.no_grad():
                    got = linear(x.unsqueeze(1))[0].view(5, 3, HEAD_DIM)
                # One query head on each rank, and the key-value head that reads it.
                heads = (tp_rank, tp_rank * kv_heads // TP, tp_rank * kv_heads // TP)
                for part, (head, whole) in enumerate(zip(heads, wanted, strict=True)):
                    label = f"{name} {layout.value}, rank {tp_rank}, {'qkv'[part]}"
                    assert_close(got[:, part], whole[:, head], label)
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_each_of_eight_ranks_has_the_rows_of_its_heads(kv_heads, tmp_path):
    """Twice, four and eight times as many ranks as key-value heads."""
    base = _base(tmp_path, kv_heads)
    for name, settings in ADAPTERS.items():
        make_adapter(base, tmp_path / name, **settings)
    run_ranks(1, _on_each_rank, tmp_path, kv_heads)


# --- the engine ----------------------------------------------------------------------------------


def _answers(rank, world_size, root):
    enable_cpu_inference()
    with model_parallel(world_size):
        model = load_hf_model(root / "base", dtype=torch.float64, for_serving=True).eval().double()
        slots = ModelSlots(model, SlotCapacity(max_loras=4, max_lora_rank=16))
        store = AdapterStore(slots, StoreOptions(host_cache_bytes=4 * slots.largest_bytes))
        for name in ADAPTERS:
            store.register(name, functools.partial(read_peft, root / name))
        sizes = {"max_num_seqs": 5, "max_num_batched_tokens": 12, "max_model_len": 32}
        sizes |= {"block_size": 4, "kv_cache_memory_bytes": 2**20}
        engine = ServingEngine(model, store, EngineOptions(**sizes))
        generator = torch.Generator().manual_seed(5)
        asked = []
        for number, name in enumerate([None, *ADAPTERS, "eight"]):
            prompt = tuple(torch.randint(0, 101, (9,), generator=generator).tolist())
            sampling = Sampling(temperature=0.0, max_tokens=8)
            asked.append(Submit(request_id=number, prompt=prompt, sampling=sampling, adapter=name))
        got, _ = run(engine, {0: asked[:3], 2: asked[3:]}, {})
        return {n: (asked[n].prompt, [c.token for c in choices]) for n, choices in got.items()}


def test_the_engine_answers_as_peft_does_with_fewer_heads_than_ranks(tmp_path):
    base = _base(tmp_path, 2)
    for name, settings in ADAPTERS.items():
        make_adapter(base, tmp_path / name, **settings)
    first, *others = run_ranks(4, _answers, tmp_path)
    assert all(other == first for other in others)
    for number, name in enumerate([None, *ADAPTERS, "eight"]):
        prompt, tokens = first[number]
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        if name is not None:
            model = PeftModel.from_pretrained(model, tmp_path / name).double()
        ids = list(prompt)
        with torch.no_grad():
            for _ in tokens:
                ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokens == ids[len(prompt) :], name


# --- what is refused, and that all say the same --------------------------------------------------


def _training(rank, world_size, root):
    with model_parallel(world_size):
        served = load_hf_model(root / "base", dtype=torch.float32, for_serving=True)
        lora = LoRAConfig(rank=8, num_blocks=world_size)
        sizes = r"each of 2 key-value heads on 2 ranks; .* size of 1, 2, without for_serving"
        with pytest.raises(UnsupportedError, match=sizes):
            apply_lora(served, lora)
        assert not list(lora_layers(served)), "a refusal leaves the model as it was"
        adapter = read_peft(root / "vanilla")
        with pytest.raises(UnsupportedError, match=sizes):
            load_adapter(served, adapter, LoadOptions(trainable=True))
        load_adapter(served, adapter)
        with pytest.raises(UnsupportedError, match=sizes):
            collect_adapter(served, "again")
        with pytest.raises(UnsupportedError, match=sizes):
            save_adapter(served, root / "saved")
        if shares_kv_heads():
            plain = load_hf_model(root / "base", dtype=torch.float32)
            with pytest.raises(UnsupportedError, match="with for_serving=True"):
                apply_lora(plain, lora)
        return {name: _held(served, read_peft(root / name)) for name in ("vanilla", "eight")}


def _held(model, adapter):
    """Numbers that this rank holds of an adapter."""
    load_adapter(model, adapter)
    return sum(p.numel() for _, layer in lora_layers(model) for p in layer.adapter.parameters())


def test_training_is_refused_with_the_sizes_that_fit_and_copies_are_counted(tmp_path):
    base = _base(tmp_path, 2)
    for name in ("vanilla", "eight"):
        make_adapter(base, tmp_path / name, **ADAPTERS[name])
    held = run_ranks(4, _training, tmp_path)
    hf = read_hf_config(base)
    assert all(numbers == held[0] for numbers in held)
    assert base_shape(hf.for_serving(4)) == base_shape(hf)
    for name, settings in {"eight": {"rank": 8, "num_blocks": 8}}.items():
        load = AdapterLoad(layout=Layout.BDLORA, **settings)
        assert held[0][name] * 4 == adapter_bytes(hf.for_serving(4), load, 4, bytes_per_element=4)
        choices = choices_for_tp(check_base(read_peft(tmp_path / name), hf), 4).choices
        assert [choice.bytes_per_rank for choice in choices if choice.name == "keep"] == [
            4 * held[0][name]
        ]
    choices = choices_for_tp(check_base(read_peft(tmp_path / "vanilla"), hf), 4).choices
    half = next(choice for choice in choices if choice.layout is Layout.HALF_SHARDED)
    # Laid out as blocks here, whose numbers are the same.
    assert half.bytes_per_rank == 4 * held[0]["vanilla"]
    with pytest.raises(ConfigError, match=r"use one of 1, 2; tp=4 is for serving alone"):
        hf.check_tp(4)


def _accepted(check):
    try:
        check()
    except BDLoRAError as error:
        return False, str(error)
    return True, ""


def _serves(rank, world_size, folder, sizes):
    """Whether a server could load the model, by size; its weights are not read."""
    found = {}
    for tp in sizes:
        torch.distributed.destroy_process_group()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
        hf = read_hf_config(folder)
        found[tp] = _accepted(
            lambda tp=tp, hf=hf: transformer_config(hf.for_serving(tp), dtype=torch.float32)
        )
        parallel_state.destroy_model_parallel()
    return found


#: Query heads, key-value heads, width inside the MLP; the sizes that serve. The first is the shape
#: of Qwen2.5-7B, whose 28 query heads eight ranks cannot share, and the second Qwen2.5-3B's.
SHAPES = {
    "qwen2.5-7b": ((28, 4, 64), {1, 2, 4}),
    "qwen2.5-3b": ((16, 2, 64), {1, 2, 4, 8, 16}),
    "three": ((12, 3, 96), {1, 3, 6, 12}),
    "mlp": ((8, 2, 44), {1, 2, 4}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_convert_plan_and_serve_agree_on_the_sizes(shape, tmp_path):
    (heads, kv_heads, ffn), fit = SHAPES[shape]
    base = _base(tmp_path, kv_heads, num_attention_heads=heads, intermediate_size=ffn, head_dim=48)
    make_adapter(base, tmp_path / "a", r=2, target_modules=["k_proj", "o_proj"])
    hf = read_hf_config(base)
    adapter = check_base(read_peft(tmp_path / "a"), hf)
    sizes = [*range(1, 9), 12, 14, 16, 28]
    (served,) = run_ranks(1, _serves, base, sizes)
    listed = ", ".join(map(str, sorted(fit)))
    for tp in sizes:
        asked = Deployment(model="it", shape=hf, hardware=HARDWARE["a100-nvlink"], tp=tp)
        planned = _accepted(lambda asked=asked: make_plan(asked))
        converted = _accepted(lambda tp=tp: choices_for_tp(adapter, tp))
        for name, (ok, message) in {
            "plan": planned, "convert": converted, "serve": served[tp]
        }.items():  # fmt: skip
            assert ok == (tp in fit), (name, tp, message)
            assert ok or listed in message, (name, tp, message)
    # Training is planned where ranks do not share heads, and the plan says where that is.
    asked = Deployment(model="it", shape=hf, hardware=HARDWARE["a100-nvlink"], tp=max(fit))
    plan = make_plan(asked)
    assert (plan.base_train is None) == (max(fit) > kv_heads)
    if plan.base_train is None:
        assert f"share {kv_heads} key-value heads" in plan.table()
        assert json.loads(json.dumps(plan.to_dict()))["base_train"] is None
