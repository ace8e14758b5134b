"""The demo's Megatron side, end to end on a tiny model: numbers, answers and what layouts send."""

from __future__ import annotations

import pytest
import torch

from bdlora_megatron.config import Layout
from examples.demo.compare import agreement_rows, cost_rows, speed_rows
from examples.demo.megatron import TP, LayoutCost, run_megatron
from examples.demo.reference import Answer, Speed, peft_reference
from tests.golden.peft_cases import blocks, make_adapter, make_base
from tests.tolerances import assert_close

HEADS = {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 6}
FLOAT = 4


@pytest.fixture
def base(tmp_path, tokenizer):
    folder = make_base(tmp_path / "base", **HEADS, num_key_value_heads=3)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path, base):
    folders = {"vanilla": tmp_path / "vanilla", "bdlora": tmp_path / "bdlora"}
    make_adapter(base, folders["vanilla"], r=4, lora_alpha=8)
    make_adapter(base, folders["bdlora"], r=6, lora_alpha=6, use_bdlora=blocks(3))
    return folders


def test_megatron_answers_as_peft_does(base, adapters):
    reference = peft_reference(base, adapters, ["one two", "three"], max_new_tokens=7)
    result = run_megatron(base, adapters, reference.prompt_ids, max_new_tokens=7)
    assert list(result.answers) == ["base", "vanilla", "bdlora"]
    for name, wanted in reference.answers.items():
        for ours, theirs in zip(result.answers[name], wanted, strict=True):
            assert_close(ours.logits, theirs.logits, name)
            assert ours.token_ids == theirs.token_ids
    texts = {tuple(answers[0].token_ids) for answers in result.answers.values()}
    assert len(texts) == 3, "the adapters must change the answer, or equality shows nothing"

    lengths = [len(a.token_ids) for answers in result.answers.values() for a in answers]
    alone, mixed = reference.speeds
    assert alone.tokens == mixed.tokens == result.speed.tokens == sum(lengths)
    # All prompts are read in the first pass, and each pass has a token of every open answer.
    assert result.speed.passes == mixed.passes == max(lengths) < alone.passes == sum(lengths)
    assert min(speed.seconds for speed in (alone, mixed, result.speed)) > 0

    costs = {cost.layout: cost for cost in result.costs}
    tokens = len(reference.prompt_ids[0])
    assert set(costs) == set(Layout)
    assert costs[Layout.BDLORA].forward == costs[Layout.BDLORA].backward == {}
    assert costs[Layout.HALF_SHARDED].forward == {}
    assert costs[Layout.HALF_SHARDED].backward == {"all_reduce": 4}
    slora = costs[Layout.SLORA]
    assert slora.forward == {"all_gather": 2, "all_reduce": 2}
    assert slora.backward == {"reduce_scatter": 2, "all_reduce": 2}
    # Rank 4 is held as 6 over three ranks; q, k, v, o, gate, up and down each send it once.
    assert slora.forward_bytes == slora.backward_bytes == 7 * 6 * tokens * FLOAT
    assert slora.tokens == tokens
    assert TP == 3


def test_agreement_tells_the_largest_difference():
    def answer(logit, ids):
        return Answer(logits=torch.tensor([[1.0, logit]]), token_ids=ids)

    wanted = {"base": [answer(-8.0, [1, 2]), answer(2.0, [3])]}
    ours = {"base": [answer(-8.5, [1, 2]), answer(2.0, [4])]}
    assert agreement_rows(wanted, ours) == [("base", "5.0e-01", "8", "1 of 2")]


def test_speeds_are_tokens_over_seconds():
    speed = Speed(name="PEFT, one after another", tokens=300, passes=300, seconds=25.0)
    assert speed_rows([speed]) == [("PEFT, one after another", 300, 300, "25.0", "12.0")]


def test_costs_name_their_collectives():
    cost = LayoutCost(
        adapter="mine",
        layout=Layout.SLORA,
        tokens=5,
        forward={"all_reduce": 2.0, "all_gather": 1.5},
        forward_bytes=1260.0,
        backward={},
        backward_bytes=0.0,
    )
    assert cost_rows([cost]) == [
        ("slora", "mine", "1.5 all-gather, 2 all-reduce", "1,260", "none", "0")
    ]
