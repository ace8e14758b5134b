"""Hugging Face models in Megatron-Core give transformers' logits, at any parallel size."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.errors import ConfigError, ShapeError, UnsupportedError
from bdlora_megatron.layers import lora_layers, lora_spec
from bdlora_megatron.models import (
    TensorFiles,
    build_model,
    default_layer_spec,
    load_hf_model,
    load_hf_weights,
    read_hf_config,
    transformer_config,
    without_padding,
)
from bdlora_megatron.runtime.cpu_inference import enable_cpu_inference
from bdlora_megatron.runtime.versions.layers import shares_kv_heads
from bdlora_megatron.serve import AdapterStore, ModelSlots, SlotCapacity, StoreOptions
from bdlora_megatron.serve.engine import EngineOptions, ServingEngine
from bdlora_megatron.serve.messages import Sampling, Submit
from tests.harness import run_ranks
from tests.tolerances import assert_close
from tests.tp.engine_cases import run
from tests.tp.hf_models import CASES, SEQUENCE, VOCAB, make_model
from tests.tp.session import model_parallel


def _inputs(ids):
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().expand(len(ids), 1, -1, -1)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(SEQUENCE).expand(len(ids), -1),
        "attention_mask": mask,
    }


def model_logits(model, ids):
    return gather_from_tensor_model_parallel_region(model(**_inputs(ids)))


def _few_kv(kind, world_size):
    return kind == "llama-few-kv" and world_size > 2


def _all_logits(rank, world_size, models):
    with model_parallel(world_size), torch.no_grad():
        found = {}
        for kind, (folder, ids, _) in models.items():
            if _few_kv(kind, world_size) and not shares_kv_heads():
                with pytest.raises(ShapeError, match="num_key_value_heads=2 is neither"):
                    load_hf_model(folder)
                continue
            model = load_hf_model(folder, dtype=torch.float32, max_sequence_length=SEQUENCE).eval()
            found[kind] = model_logits(model, ids)
        return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder, token ids and transformers' logits of every kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in CASES}
    return {kind: (folder, *make_model(kind, folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def logits_by_rank(request, models):
    return run_ranks(request.param, _all_logits, models)


@pytest.mark.parametrize("kind", CASES)
def test_logits_equal_transformers(kind, models, logits_by_rank):
    _, _, wanted = models[kind]
    if _few_kv(kind, len(logits_by_rank)) and not shares_kv_heads():
        pytest.skip("refused: Megatron-Core before 0.16 needs a key-value head on each rank")
    for logits in logits_by_rank:
        assert_close(logits[kind][..., :VOCAB], wanted, "logits")
        assert (logits[kind][..., VOCAB:] == float("-inf")).all(), "padding of the vocabulary"


def _by_stage(rank, world_size, folder, ids):
    """Logits on the ranks of the last pipeline stage, None on the others."""
    with model_parallel(2, pp=3), torch.no_grad():
        model = load_hf_model(folder, dtype=torch.float32).eval()
        if not model.pre_process:
            hidden = torch.empty(SEQUENCE, len(ids), model.config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        out = model(**_inputs(ids))
        if model.post_process:
            return gather_from_tensor_model_parallel_region(out)
        torch.distributed.send(
            out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
        )
        return None


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_pipeline_stages_hold_their_own_layers(kind, tmp_path):
    ids, wanted = make_model(kind, tmp_path)
    found = run_ranks(6, _by_stage, tmp_path, ids)
    assert [logits is None for logits in found] == [True] * 4 + [False] * 2
    assert_close(found[-1][..., :VOCAB], wanted, "logits")


def test_sequence_parallelism_and_files_in_parts(tmp_path):
    ids, wanted = make_model("qwen3", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    # Sequence parallelism divides the sequence.
    ids, wanted = ids[:, :-1], wanted[:, :-1]
    for logits in run_ranks(2, _sequence_parallel, tmp_path, ids):
        assert_close(logits[..., :VOCAB], wanted, "logits")


def _sequence_parallel(rank, world_size, folder, ids):
    with model_parallel(world_size), torch.no_grad():
        settings = {"sequence_parallel": True}
        model = load_hf_model(folder, dtype=torch.float32, settings=settings).eval()
        inputs = _inputs(torch.nn.functional.pad(ids, (0, 1)))
        inputs = {key: value[..., :-1] for key, value in inputs.items()}
        inputs["attention_mask"] = inputs["attention_mask"][:, :, :-1]
        return gather_from_tensor_model_parallel_region(model(**inputs))


def _with_adapters(rank, world_size, folder, ids):
    with model_parallel(world_size), torch.no_grad():
        hf = read_hf_config(folder)
        config = transformer_config(hf, dtype=torch.float32)
        spec = lora_spec(default_layer_spec(hf), config, LoRAConfig(rank=4, num_blocks=2))
        model = load_hf_model(folder, dtype=torch.float32, layer_spec=spec).eval()
        # Adapters start as no change; any that was filled from a file would change something.
        assert len(list(lora_layers(model))) == 4 * hf.num_layers
        return model_logits(model, ids)


def test_a_specification_with_adapters_is_filled_around_them(tmp_path):
    ids, wanted = make_model("qwen2", tmp_path)
    for logits in run_ranks(2, _with_adapters, tmp_path, ids):
        assert_close(logits[..., :VOCAB], wanted, "logits")


def _cut(rank, world_size, folder, ids):
    with model_parallel(world_size), torch.no_grad():
        model, hf = load_hf_model(folder).eval(), read_hf_config(folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "as stored"
        shard = model(**_inputs(ids))
        with pytest.raises(ShapeError, match=r"\[2, 13, 27\]; 54 in the last dimension"):
            without_padding(shard, hf)
        return without_padding(gather_from_tensor_model_parallel_region(shard), hf)


def test_the_files_decide_the_type_and_padding_is_cut_off(tmp_path):
    ids, wanted = make_model("llama", tmp_path)
    for logits in run_ranks(2, _cut, tmp_path, ids):
        assert_close(logits, wanted, "logits")


class _CountingFiles(TensorFiles):
    """Notes how many numbers are read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.sizes = []

    def rows(self, name, start, stop):
        return self._count(super().rows(name, start, stop))

    def columns(self, name, start, stop):
        return self._count(super().columns(name, start, stop))

    def _count(self, part):
        self.sizes.append(part.numel())
        return part


def _read_sizes(rank, world_size, folder):
    with model_parallel(world_size):
        hf = read_hf_config(folder)
        model = build_model(hf, transformer_config(hf, dtype=torch.bfloat16))
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        with _CountingFiles(folder) as files:
            load_hf_weights(model, hf, files)
        # Padding rows as well: they take part in the gradient of the hidden state.
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        return files.sizes, [parameter.numel() for parameter in model.parameters()]


def test_a_rank_reads_no_more_than_it_holds(tmp_path):
    make_model("llama", tmp_path)
    for read, held in run_ranks(4, _read_sizes, tmp_path):
        # The vocabulary's padding, in embedding and output layer, is held and not read.
        assert sum(held) - sum(read) in {0, 2 * 3 * 24}
        assert max(read) <= max(held)


def _loss(rank, world_size, folder, ids):
    with model_parallel(world_size):
        model = load_hf_model(folder, dtype=torch.float32)
        labels = ids.roll(-1, dims=1)
        loss = model(**_inputs(ids), labels=labels)
        loss.sum().backward()
        grads = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        return loss.detach()


def test_padding_of_the_vocabulary_adds_nothing_to_the_loss(tmp_path):
    ids, logits = make_model("llama-tied", tmp_path)
    wanted = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids.roll(-1, dims=1), reduction="none"
    )
    for loss in run_ranks(4, _loss, tmp_path, ids):
        assert_close(loss, wanted, "loss")


def _bfloat16(rank, world_size, folder, ids):
    with model_parallel(world_size), torch.no_grad():
        model = load_hf_model(folder, dtype=torch.bfloat16).eval()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.bf16
        return model_logits(model, ids)


def test_bfloat16(tmp_path):
    ids, wanted = make_model("llama", tmp_path)
    for logits in run_ranks(2, _bfloat16, tmp_path, ids):
        error = (logits[..., :VOCAB].float() - wanted).square().mean().sqrt()
        # 8 bits of mantissa through three layers; a wrong tensor's error is as large as the logits.
        assert error < 0.03 * wanted.square().mean().sqrt()


def _quantised(folder, form):
    """Store the linear layers in FP8; return each one's numbers as they then are."""
    path, blocks = folder / "model.safetensors", {"block": (8, 5)}.get(form)
    tensors, exact = load_file(path), {}
    for name, weight in list(tensors.items()):
        if not name.endswith("_proj.weight"):
            continue
        scale = torch.rand(len(weight), 1) + 0.5
        if blocks is not None:
            scale = (
                torch.rand(*(-(-n // b) for n, b in zip(weight.shape, blocks, strict=True))) + 0.5
            )
        full = scale
        for dim, size in enumerate(blocks or ()):
            full = full.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
        tensors[name] = (weight / full).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale{'_inv' if blocks else ''}"] = scale
        exact[name] = tensors[name].float() * full
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": blocks}
    if blocks is None:
        config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def _dequantised(rank, world_size, folders):
    with model_parallel(world_size), torch.no_grad():
        return {
            kind: model_logits(load_hf_model(folder, dtype=torch.float32).eval(), ids)
            for kind, (folder, ids) in folders.items()
        }


def test_fp8_files_give_the_logits_of_their_dequantised_weights(tmp_path):
    folders, wanted = {}, {}
    for kind, form in (("llama", "row"), ("qwen3", "block"), ("phi3", "block")):
        folder = tmp_path / kind
        ids, before = make_model(kind, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.load_state_dict(_quantised(folder, form), strict=False)
        folders[kind] = (folder, ids)
        with torch.no_grad():
            wanted[kind] = model(ids).logits
        assert (wanted[kind] - before).abs().max() > 0.01, "rounding to FP8 changes the logits"
    for found in run_ranks(2, _dequantised, folders):
        for kind, logits in found.items():
            assert_close(logits[..., :VOCAB], wanted[kind], kind)


#: What attention computes with positions and biases when keys are cached.
SERVED = ("llama-attention-biases", "llama3-other-limits", "yarn", "phi3-partial", "phi3-longrope")


def _continued(rank, world_size, folders):
    enable_cpu_inference()
    with model_parallel(world_size):
        return {kind: _greedy(folder, ids) for kind, (folder, ids) in folders.items()}


def _greedy(folder, ids):
    model = load_hf_model(
        folder, dtype=torch.float64, max_sequence_length=16, for_serving=True
    ).eval()
    slots = ModelSlots(model.double(), SlotCapacity(max_loras=1, max_lora_rank=8))
    store = AdapterStore(slots, StoreOptions(host_cache_bytes=2**20))
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 16}
    sizes |= {"block_size": 4, "kv_cache_memory_bytes": 2**20}
    engine = ServingEngine(model, store, EngineOptions(**sizes))
    sampling = Sampling(temperature=0.0, max_tokens=6)
    asked = [
        Submit(request_id=number, prompt=tuple(row[:10].tolist()), sampling=sampling, adapter=None)
        for number, row in enumerate(ids)
    ]
    got, _ = run(engine, {0: asked}, {})
    return [[choice.token for choice in got[number]] for number in range(len(ids))]


def test_the_engine_continues_as_transformers_does(models):
    folders = {kind: models[kind][:2] for kind in SERVED}
    first, second = run_ranks(2, _continued, folders)
    assert first == second
    for kind, (folder, ids) in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for row, tokens in zip(ids, first[kind], strict=True):
            known = row[:10].tolist()
            with torch.no_grad():
                for _ in tokens:
                    known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
            assert tokens == known[10:], kind


# --- refusals ----------------------------------------------------------------------------------


def _refused(rank, world_size, folder, kind, match, options):
    with model_parallel(world_size), pytest.raises(kind, match=match) as caught:
        load_hf_model(folder, dtype=torch.float32, **options)
    return str(caught.value)


def _edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_weights_that_do_not_fit_are_told_all_at_once(tmp_path):
    make_model("llama", tmp_path)

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
        tensors["model.norm.weight"] = torch.ones(25)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)

    _edit(tmp_path, change)
    message = run_ranks(1, _refused, tmp_path, ShapeError, "do not fit its config.json", {})[0]
    assert message.splitlines()[1:] == [
        "- lm_head.weight [53, 24] is missing",
        "- model.layers.1.mlp.up_proj.weight [44, 24] is missing",
        "- model.layers.0.self_attn.q_proj.bias [48] has no place in this model",
        "- model.norm.weight is [25]; [24] was expected",
    ]


def test_a_long_list_is_cut_short(tmp_path):
    make_model("llama", tmp_path)
    _edit(tmp_path, lambda tensors: tensors.clear() or tensors.update(x=torch.ones(1)))
    # 3 layers of 9 tensors, 3 outside them, and the one that is too much.
    run_ranks(1, _refused, tmp_path, ShapeError, "- and 11 more$", {})


def test_a_tied_model_may_store_its_output_layer_if_it_is_the_embedding(tmp_path):
    ids, wanted = make_model("llama-tied", tmp_path)

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def differ(tensors):
        tensors["lm_head.weight"][-1, -1] += 1

    _edit(tmp_path, repeat)
    logits = run_ranks(1, _logits, tmp_path, ids)[0]
    assert_close(logits[..., :VOCAB], wanted, "logits")
    _edit(tmp_path, differ)
    match = r"lm_head.weight \[53, 48\] has no place"
    run_ranks(1, _refused, tmp_path, ShapeError, match, {})


def _logits(rank, world_size, folder, ids):
    with model_parallel(world_size), torch.no_grad():
        return model_logits(load_hf_model(folder, dtype=torch.float32).eval(), ids)


REFUSED = {
    "division": (
        3,
        ShapeError,
        r"over 3 tensor.*_attention_heads=8 .* of 3; intermediate_size=44 .*heads=4 is nei",
        {},
    ),
    "settings": (1, ConfigError, "settings name hidden_size", {"settings": {"hidden_size": 2}}),
    "window": (1, UnsupportedError, "sliding_window=13 .*max_sequence_length=13 or less", {}),
}


def test_longrope_is_refused_beyond_its_short_factors(tmp_path):
    make_model("phi3-longrope", tmp_path)
    match = "frequencies beyond 16 positions, and max_sequence_length=64"
    run_ranks(1, _refused, tmp_path, UnsupportedError, match, {})


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, tmp_path):
    world_size, kind, match, options = REFUSED[name]
    make_model("mistral-window", tmp_path)
    run_ranks(world_size, _refused, tmp_path, kind, match, options)


def _other_shape(rank, world_size, folder, other):
    with model_parallel(world_size):
        hf, different = read_hf_config(folder), read_hf_config(other)
        config = transformer_config(different, dtype=torch.float32)
        model = build_model(different, config)
        with TensorFiles(folder) as files, pytest.raises(ShapeError, match="a share of"):
            load_hf_weights(model, hf, files)
        config = transformer_config(hf, dtype=torch.float32, settings={})
        config.add_qkv_bias = True
        model = build_model(hf, config)
        with TensorFiles(folder) as files, pytest.raises(ShapeError, match="has no counterpart"):
            load_hf_weights(model, hf, files)


def test_a_model_of_another_shape_is_not_filled(tmp_path):
    make_model("llama", tmp_path / "a")
    make_model("llama-tied", tmp_path / "b")
    run_ranks(1, _other_shape, tmp_path / "a", tmp_path / "b")


def test_config_and_weights_of_different_models_are_refused(tmp_path):
    make_model("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "head_dim": 8}))
    run_ranks(1, _refused, tmp_path, ShapeError, r"q_proj.weight is \[48, 24\]; \[64, 24\]", {})
