"""Training an Activated LoRA: the loss and all gradients are those of PEFT's aLoRA in fp64."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bdlora_megatron.blocks import reshard
from bdlora_megatron.config import LoRAConfig
from bdlora_megatron.convert import WriteOptions, read_adapter, write_adapter
from bdlora_megatron.errors import ConfigError, UnsupportedError
from bdlora_megatron.export import save_adapter
from bdlora_megatron.layers import (
    LoadOptions,
    act_on,
    active_tokens,
    apply_lora,
    collect_adapter,
    load_adapter,
    merge_adapters,
)
from bdlora_megatron.models import read_hf_config
from bdlora_megatron.models.check import base_shape
from bdlora_megatron.train.data import RowDataset, check_invocation
from bdlora_megatron.train.examples import Example
from bdlora_megatron.train.model import build_model
from bdlora_megatron.train.peft import resolve_peft
from bdlora_megatron.train.step import Stepper, forward_backward
from benchmarks.step_collectives import measure_step
from tests.harness import run_ranks
from tests.tolerances import MODEL_GRADIENTS, assert_close
from tests.tp.models import tokens
from tests.tp.serving_cases import make_adapter, serving_model
from tests.tp.session import model_parallel
from tests.train.runs import (
    VOCAB,
    collect_gradients,
    make_files,
    randomize_gently,
    settings,
    train_each,
    training_rows,
)

#: ``<|assistant|>``: of a chat of several turns, the last answer's.
INVOCATION = [2]
SCHEME = {"scheme": "bdlora", "bdlora": {"num_blocks": 6, "rank": 12}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Files, and a random adapter with PEFT's gradients in fp64."""
    root = make_files(tmp_path_factory.mktemp("activated"))
    config = config_of(root)
    run_ranks(1, write, config)
    # Examples that are filled up for context-parallel ranks make other rows.
    for ranks in (1, 2):
        wanted = reference(root, config_of(root, context_parallel_size=ranks))
        torch.save(wanted, f"{config.checkpoint.save}/wanted-{ranks}.pt")
    return root


def config_of(root, invocation=INVOCATION, **model):
    model = {"hf_path": str(root / "base"), "seq_length": 48, "dtype": "float32", **model}
    train = {"train_iters": 1, "global_batch_size": 4, "micro_batch_size": 1}
    peft = {**SCHEME, "invocation_tokens": invocation}
    return settings(root, root / "run", model=model, peft=peft, train=train, scheduler={})


def batches_of(config):
    """Four rows; as each rank has them where there is one data-parallel rank."""
    examples = training_rows(config)._examples
    rows = RowDataset(
        examples,
        config.model.seq_length,
        packing=True,
        seed=3,
        cp_size=config.model.context_parallel_size,
        invocation_tokens=config.peft.invocation_tokens,
    )
    return [rows.batch([row]) for row in range(4)]


def write(rank, world_size, config):
    with model_parallel(1):
        model, _ = build_model(config)
        randomize_gently(model)
        adapter = collect_adapter(model, "random")
        assert adapter.invocation_tokens == tuple(INVOCATION)
        # PEFT has no blocks for it; the function is the same.
        for name, dense in (("blocked", False), ("dense", True)):
            path = f"{config.checkpoint.save}/{name}"
            write_adapter(adapter, path, "peft", options=WriteOptions(dense=dense))


def reference(root, config):
    """Loss and gradients of PEFT, example by example; nothing of Megatron-Core's."""
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float64)
    folder = f"{config.checkpoint.save}/dense"
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    total, count, found = torch.zeros((), dtype=torch.float64), 0, []
    for batch in batches_of(config):
        learnt = torch.zeros(batch.labels.shape).index_fill_(0, batch.learnt, 1.0)
        for start, stop in pairwise(batch.starts.tolist()):
            ids = torch.cat([batch.tokens[:, start:stop], batch.labels[None, stop - 1 : stop]], 1)
            found.append((ids == INVOCATION[0]).sum().item() * learnt[start:stop].any().item())
            logits = model(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits, batch.labels[start:stop], reduction="none"
            )
            total = total + (losses * learnt[start:stop]).sum()
        count += len(batch.learnt)
    assert max(found) > 1, "no example has several turns"
    assert len(found) > 4, "no row holds two examples"
    loss = total / count
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def gradients(rank, world_size, config):
    sizes = config.model
    tp, pp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
    with model_parallel(tp, pp=pp, cp=sizes.context_parallel_size):
        model, _ = build_model(config)
        options = LoadOptions(trainable=True, dtype=torch.float32)
        load_adapter(model, read_adapter(f"{config.checkpoint.save}/blocked"), options)
        stepper = Stepper(model, config)
        loss, _ = forward_backward(stepper.model, batches_of(config), config)
        return loss, collect_gradients(model)


CASES = {
    "tp2-sequence-recomputed": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "full",
    },
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_pefts_alora(root, case):
    config = config_of(root, **CASES[case])
    wanted_loss, wanted = torch.load(
        f"{config.checkpoint.save}/wanted-{config.model.context_parallel_size}.pt"
    )
    for loss, modules in run_ranks(2, gradients, config):
        assert loss == pytest.approx(wanted_loss, rel=1e-6)
        names = set()
        for key, factors in modules.items():
            ones = replace(factors, A=torch.ones_like(factors.A), B=torch.ones_like(factors.B))
            dense, places = reshard(factors, 1), reshard(ones, 1)
            for letter in "AB":
                name = f"base_model.model.model.{key}.lora_{letter}.default.weight"
                names.add(name)
                # Of the dense factor, those numbers that blocks have.
                kept = wanted[name] * getattr(places, letter)
                assert_close(getattr(dense, letter), kept, name, MODEL_GRADIENTS)
        assert names == wanted.keys()


def calls(rank, world_size, configs):
    with model_parallel(2):
        return [measure_step(config, batches_of(config)) for config in configs]


def test_it_sends_nothing_of_its_own(root):
    """As many collectives, and bytes of each, as the same adapter that acts on every token."""
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    configs = [config_of(root, tokens, **parallel) for tokens in (INVOCATION, [])]
    for activated, plain in run_ranks(2, calls, configs):
        assert activated == plain != {}


def test_a_run_exports_its_tokens_and_starts_from_such_an_adapter_alone(root):
    def case(name, invocation, **peft):
        return settings(
            root,
            root / "runs" / name,
            peft={**SCHEME, "invocation_tokens": invocation, **peft},
            train={"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2},
            scheduler={},
        )

    first = str(root / "runs" / "first" / "adapter")
    ((done, said), (again, _), (other, _), (absent, _)) = run_ranks(
        1,
        train_each,
        [
            case("first", INVOCATION),
            case("again", INVOCATION, init_from=first),
            case("other", [], init_from=first),
            case("absent", [2, 2, 2]),
        ],
    )[0]
    assert done.steps == again.steps == 2
    assert "lack peft.invocation_tokens" not in said
    base = base_shape(read_hf_config(root / "base"))
    for folder in (first, root / "runs" / "first" / "step_00000002"):
        assert read_adapter(folder, base=base).invocation_tokens == tuple(INVOCATION)
    config = json.loads((root / "runs" / "first" / "adapter/adapter_config.json").read_text())
    assert (config["alora_invocation_tokens"], config["task_type"]) == (INVOCATION, "CAUSAL_LM")
    assert "peft.invocation_tokens is [], and the adapter acts from the tokens [2] on" in str(other)
    assert "none of the first 23 examples has them" in str(absent)
    with pytest.raises(ConfigError, match="the base model's ids end at 330"):
        resolve_peft(case("beyond", [2, VOCAB]).peft, read_hf_config(root / "base"))


def example(*ids):
    whole = torch.tensor(ids, dtype=torch.int32).numpy()
    return Example(tokens=whole, learnt=whole > 0)


def test_a_rows_examples_begin_each_by_itself():
    examples = [example(5, 7, 8, 7, 8, 1), example(1, 2, 3), example(9, 7, 8), example(4, 7)]
    rows = RowDataset(examples, 16, packing=True, seed=0, invocation_tokens=(7, 8))
    batch = rows.batch([0])
    found = {}
    for start, stop in pairwise(batch.starts.tolist()):
        found[tuple(batch.tokens[0, start:stop].tolist())] = batch.acts[0, start:stop].tolist()
    # The last two tokens of the third are an invocation, whose second is no input.
    assert found[5, 7, 8, 7, 8] == [False, False, False, True, True]
    assert found[9, 7] == [False, True]
    assert found[1, 2] == [False, False]
    # An invocation never reaches from one example into the next, nor into padding.
    assert found[4,] == [False]
    assert not batch.acts[0, sum(map(len, examples)) :].any()
    assert RowDataset(examples, 16, packing=True, seed=0).batch([0]).acts is None


def test_examples_without_an_invocation_are_told():
    having, lacking = example(1, 7, 8, 2), example(1, 8, 7, 2)
    assert check_invocation([having, lacking, having], ()) == []
    assert check_invocation([having] * 3, (7, 8)) == []
    (told,) = check_invocation([having, lacking, lacking], (7, 8))
    assert told.startswith("2 of the first 3 examples lack peft.invocation_tokens")
    with pytest.raises(ConfigError, match="none of the first 2 examples has them"):
        check_invocation([lacking] * 2, (7, 8))


def own_loop(rank, world_size, folder):
    with model_parallel(1):
        adapter = replace(make_adapter(3), invocation_tokens=(7,))
        given = tokens()
        given["input_ids"][0, 4] = given["input_ids"][0, 9] = 7
        given["input_ids"][1][given["input_ids"][1] == 7] = 8
        logits = []
        model = serving_model(1, params_dtype=torch.float64, pipeline_dtype=torch.float64).double()
        logits.append(model(**given))
        load_adapter(model, adapter)
        with pytest.raises(ConfigError, match=r"has 24 tokens, of which it was told nothing"):
            model(**given)
        with pytest.raises(ConfigError, match=r"wanted bool \[b, S\]"):
            act_on(model, given["input_ids"])
        acts = active_tokens(given["input_ids"], (7,))
        assert [row.nonzero().flatten().tolist() for row in acts] == [[9, 10, 11], []]
        act_on(model, acts)
        logits.append(model(**given))
        with pytest.raises(ConfigError, match=r"has 12 tokens, of which it was told 24"):
            model(**{name: value[:1] for name, value in given.items()})
        assert collect_adapter(model, "back").invocation_tokens == (7,)
        assert read_adapter(save_adapter(model, folder / "saved")).invocation_tokens == (7,)
        with pytest.raises(UnsupportedError, match="a merged weight on every token"):
            merge_adapters(model)
        load_adapter(model, make_adapter(3))
        logits.append(model(**given))
        base, found, everywhere = logits
        assert torch.equal(found[1], base[1])
        assert torch.equal(found[0, :9], base[0, :9])
        changed = (found[0, 9:] - base[0, 9:]).abs().amax(-1)
        assert changed.min() > 0.1 * (everywhere[0, 9:] - base[0, 9:]).abs().amax()
        assert not torch.allclose(found[0, 9:], everywhere[0, 9:]), "the base's keys are used"
        model.config.recompute_granularity = "full"
        for in_turn, stages in ((False, 1), (True, 2)):
            model.config.pipeline_model_parallel_size = stages
            load_adapter(model, adapter)
            with pytest.raises(UnsupportedError, match="a later batch's mask"):
                act_on(model, acts, in_turn=in_turn)
            with torch.no_grad():
                act_on(model, acts)
        model.config.pipeline_model_parallel_size = 1
        act_on(model, acts, in_turn=True)
        # A fresh one, in a training loop of one's own.
        fresh = serving_model(1)
        apply_lora(fresh, LoRAConfig(rank=4, layout="half_sharded", invocation_tokens=[7]))
        act_on(fresh, acts)
        fresh(**given).sum().backward()


def test_a_training_loop_of_ones_own_tells_each_batchs_tokens(tmp_path):
    run_ranks(1, own_loop, tmp_path)


@pytest.mark.parametrize("wrong", [[], [-1], ["7"], [True], [1.0]])
def test_what_are_no_token_ids_is_refused(wrong):
    with pytest.raises(ConfigError, match="wanted token ids, at least one"):
        LoRAConfig(rank=4, num_blocks=2, invocation_tokens=wrong)


def test_settings_that_contradict_it_are_refused(root):
    stages = {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}
    with pytest.raises(ConfigError, match=r"model\.recompute_granularity is full; with peft\.inv"):
        config_of(root, **stages)
    config_of(root, [], **stages)
    assert config_of(root, None).peft.invocation_tokens == ()
    for wrong in ("<|assistant|>", 2):
        with pytest.raises(ConfigError, match=r"invocation_tokens: it is .* wanted a list of tok"):
            config_of(root, wrong)
    with pytest.raises(ConfigError, match=r"invocation_tokens\.1 is -1; wanted at least 0"):
        config_of(root, [2, -1])
    with pytest.raises(ConfigError, match="scheme none has no adapter"):
        settings(root, root / "none", peft={"scheme": "none", "invocation_tokens": [2]})
