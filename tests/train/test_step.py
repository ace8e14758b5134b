"""One step: its gradients against PEFT in fp64, and what it communicates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bdlora_megatron.config import Layout
from bdlora_megatron.convert import WriteOptions, read_peft, write_adapter
from bdlora_megatron.layers import LoadOptions, collect_adapter, load_adapter
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.step import Stepper, forward_backward, mean_loss
from benchmarks.step_collectives import measure_step
from tests.harness import run_ranks
from tests.tolerances import MODEL_GRADIENTS, assert_close
from tests.tp.models import randomize_adapters
from tests.tp.session import model_parallel
from tests.train.runs import (
    collect_gradients,
    first_batches,
    make_base,
    make_files,
    randomize_gently,
    settings,
    training_rows,
)

SCHEMES = {
    "bdlora": {"scheme": "bdlora", "bdlora": {"num_blocks": 6, "rank": 12}},
    "lora": {"scheme": "lora", "lora": {"rank": 6}},
    "slora": {"scheme": "slora", "lora": {"rank": 6}},
}
NONE = {"scheme": "none"}
SIZES = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "dp2": (2, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2-pp2-sequence": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "tp2-dp2-sequence": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp3": (3, {"context_parallel_size": 3}),
    "tp2-cp2-sequence": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "context_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
    "cp2-pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2-dp2": (4, {"context_parallel_size": 2}),
    "pp2-vp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "tp2-pp2-vp2-gpt-sequence": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
            "model_class": "gpt",
        },
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Files, and for each scheme a random adapter with PEFT's gradients in fp64."""
    root = make_files(tmp_path_factory.mktemp("step"))
    # Two chunks on each of two stages.
    make_base(root / "base", num_hidden_layers=4)
    for scheme in SCHEMES:
        run_ranks(1, _write, _config(root, scheme))
        _make_reference(root, scheme)
    # Examples that are filled up for context-parallel ranks make other rows.
    for ranks in (2, 3):
        _make_reference(root, "bdlora", context_parallel_size=ranks)
    return root


def _make_reference(root, scheme, **model):
    config = _config(root, scheme, **model)
    torch.save(_reference(root, config), root / _name(config))


def _name(config):
    return f"{config.peft.scheme}-{config.model.context_parallel_size}.pt"


def _config(root, scheme, **model):
    model = {"hf_path": str(root / "base"), "seq_length": 48, "dtype": "float32", **model}
    train = {"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 1}
    return settings(
        root, root / scheme, model=model, peft=SCHEMES.get(scheme, NONE), train=train, scheduler={}
    )


def _write(rank, world_size, config):
    with model_parallel(1):
        model, _ = build_model(config)
        randomize_gently(model)
        adapter = collect_adapter(model, "random")
        write_adapter(adapter, config.checkpoint.save, "peft", options=WriteOptions(overwrite=True))


def _reference(root, config):
    """Loss and gradients of ``transformers`` and PEFT; nothing of Megatron-Core's."""
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float64)
    adapter = config.checkpoint.save
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).double()
    batch = training_rows(config).batch([0, 1, 2, 3])
    assert len(batch.starts) - 1 > 4, "no row holds two examples"
    learnt = torch.zeros(batch.labels.shape).index_fill_(0, batch.learnt, 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in pairwise(batch.starts.tolist()):
        # Each example by itself: no other is there that it could see.
        logits = model(input_ids=batch.tokens[:, start:stop]).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, batch.labels[start:stop], reduction="none"
        )
        total = total + (losses * learnt[start:stop]).sum()
    loss = total / learnt.sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "grads": grads}


def _load(model, config):
    """Put the random adapter in, in the layout of the scheme."""
    scheme = config.peft.scheme
    layout = {"bdlora": "bdlora", "lora": "half_sharded", "slora": "slora"}[scheme]
    options = LoadOptions(layout=Layout(layout), trainable=True, dtype=torch.float32)
    load_adapter(model, read_peft(config.checkpoint.save), options)


def _share(config):
    return first_batches(config, micro_batch_size=1)


def _gradients(rank, world_size, config):
    """The loss, and every factor's gradient put together from all ranks."""
    tp, pp = config.model.tensor_model_parallel_size, config.model.pipeline_model_parallel_size
    vp, cp = config.model.chunks_per_stage, config.model.context_parallel_size
    with model_parallel(tp, pp=pp, vp=vp, cp=cp):
        model, _ = build_model(config)
        _load(model, config)
        stepper = Stepper(model, config)
        loss, _ = forward_backward(stepper.model, _share(config), config)
        return loss, collect_gradients(model)


def _named(modules):
    """PEFT's names of the factors."""
    for key, factors in modules.items():
        for letter in "AB":
            name = f"base_model.model.model.{key}.lora_{letter}.default.weight"
            yield name, getattr(factors, letter)


@pytest.mark.parametrize(
    ("size", "scheme"),
    [*((size, "bdlora") for size in SIZES), ("tp2-sequence", "lora"), ("tp2-sequence", "slora")],
)
def test_gradients_are_those_of_peft_in_fp64(root, size, scheme):
    world_size, model = SIZES[size]
    config = _config(root, scheme, **model)
    wanted = torch.load(root / _name(config))
    for loss, modules in run_ranks(world_size, _gradients, config):
        assert loss == pytest.approx(wanted["loss"], rel=1e-6)
        found = dict(_named(modules))
        assert found.keys() == wanted["grads"].keys()
        for name, gradient in wanted["grads"].items():
            assert_close(found[name], gradient, name, MODEL_GRADIENTS)


def _calls(rank, world_size, config):
    sizes = config.model
    with model_parallel(sizes.tensor_model_parallel_size, cp=sizes.context_parallel_size):
        return measure_step(config, _share(config))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tensor", "sequence"])
def test_a_step_of_bdlora_sends_what_the_base_sends(root, sequence_parallel):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    counted = {}
    for scheme in ("none", *SCHEMES):
        config = _config(root, scheme, **parallel)
        first, second = run_ranks(2, _calls, config)
        assert first == second
        counted[scheme] = first
    assert counted["none"], "nothing was counted"
    assert counted["bdlora"] == counted["none"]
    # Per layer and micro-batch: one exchange at the rank in each of four linears, both ways.
    layers, micro_batches = 4, 4
    more = sum(counted["slora"].values()) - sum(counted["none"].values())
    assert more == 8 * layers * micro_batches
    # Forward nothing; backward the gradient of four replicated factors.
    more = sum(counted["lora"].values()) - sum(counted["none"].values())
    assert more == 4 * layers * micro_batches


def test_context_parallel_ranks_exchange_keys_and_values_and_nothing_for_bdlora(root):
    counted = {}
    for scheme in ("none", "bdlora"):
        first, second = run_ranks(2, _calls, _config(root, scheme, context_parallel_size=2))
        assert first == second
        counted[scheme] = first
    # Keys and values of a row: 6 heads of 4 features each, in float32.
    layers, micro_batches, payload = 4, 4, 48 * 2 * 6 * 4 * 4
    each = {(kind, payload): layers * micro_batches for kind in ("all_gather", "reduce_scatter")}
    assert counted["none"] == each
    # The factors' gradients, summed once a step as over data-parallel ranks.
    (reduced,) = counted["bdlora"].keys() - each.keys()
    assert reduced[0] == "all_reduce"
    assert counted["bdlora"] == {**each, reduced: 1}


def _norm(rank, world_size, config):
    """The norm by which a step clips, of all ranks' gradients together."""
    tp = config.model.tensor_model_parallel_size
    with model_parallel(tp):
        model, _ = build_model(config)
        _load(model, config)
        return Stepper(model, config).train_step(0, _share(config)).grad_norm


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_clipped_norm_is_that_of_pefts_gradients(root, scheme):
    """Each replicated factor counts once, and each shard with those of the other ranks."""
    wanted = torch.load(root / f"{scheme}-1.pt")["grads"].values()
    norm = float(torch.linalg.vector_norm(torch.stack([g.norm() for g in wanted])))
    found = run_ranks(2, _norm, _config(root, scheme, tensor_model_parallel_size=2))
    assert found == [pytest.approx(norm, rel=1e-5)] * 2


def _dropout(rank, world_size, config):
    """Losses with dropout: of two steps, of the first again, and of validation, twice."""
    with model_parallel(1):
        model, _ = build_model(config)
        randomize_adapters(model)
        stepper, batches = Stepper(model, config), _share(config)
        trained = [stepper.train_step(step, batches).loss for step in (0, 1, 0)]
        return trained, [mean_loss(stepper.model, batches, config) for _ in range(2)]


def test_dropout_draws_anew_in_each_step_and_never_in_validation(root):
    losses = {}
    for dropout in (0.0, 0.5):
        peft = {"scheme": "lora", "lora": {"rank": 6, "dropout": dropout}}
        # A learning rate of nothing: whatever differs was drawn.
        config = settings(
            root,
            root / "dropout",
            model={"hf_path": str(root / "base"), "seq_length": 48, "dtype": "float32"},
            peft=peft,
            train={"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 1},
            scheduler={},
            optimizer={"lr": 0.0},
        )
        ((trained, validated),) = run_ranks(1, _dropout, config)
        assert validated[0] == validated[1]
        losses[dropout] = trained, validated
    (first, second, again), validated = losses[0.5]
    assert first == again
    assert first != second
    # Without dropout every loss is the one of validation.
    assert losses[0.0][0] == [losses[0.0][1][0]] * 3
    assert validated == losses[0.0][1]
