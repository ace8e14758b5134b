"""The demo's own arithmetic: what it trains on, what the loss counts, how a table is set."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from examples.demo.chat import encode_prompt
from examples.demo.report import format_answer, format_table
from examples.demo.texts import Example, _speech_pairs, python_reference
from examples.demo.train import IGNORED, collate, recipes

PLAY = """## ACT I

_Enter two_

**FIRST**
Who goes
there?

**SECOND**
A friend.

_A noise_

**SECOND**
Still a friend.

**FIRST**
Then enter.
"""


def test_speech_pairs_leave_out_a_character_who_goes_on():
    pairs = list(_speech_pairs(PLAY))
    assert pairs == [("Who goes\nthere?", "A friend."), ("Still a friend.", "Then enter.")]


def test_python_reference_is_prose_without_repeats():
    examples = python_reference()
    assert len(examples) >= 100  # More than the default training and the held-out part need.
    assert len({example.answer for example in examples}) == len(examples)
    assert all(example.prompt.startswith("What is ") for example in examples)
    assert not any("::=" in example.answer for example in examples)


def test_collate_counts_answers_only(tokenizer):
    assert encode_prompt(tokenizer, "one") == [2, 4, 3]
    batch = collate(tokenizer, [Example("one", "two three"), Example("one two", "four")])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 5, 6, 1], [2, 4, 5, 3, 7, 1]]
    skip = IGNORED
    assert batch["labels"].tolist() == [[skip, skip, skip, 5, 6, 1], [skip, skip, skip, skip, 7, 1]]


def test_collate_hides_padding(tokenizer):
    batch = collate(tokenizer, [Example("one", "two"), Example("one", "two three four")])
    assert batch["input_ids"][0].tolist() == [2, 4, 3, 5, 1, 0, 0]
    assert batch["labels"][0].tolist()[-2:] == [IGNORED, IGNORED]
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([5, 7]))


def test_recipes_have_like_budgets():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    vanilla, blocked = recipes(config)["vanilla"].lora, recipes(config)["bdlora"].lora
    assert (vanilla.r, blocked.r) == (8, 12)
    assert vanilla.lora_alpha / vanilla.r == blocked.lora_alpha / blocked.r
    assert set(vanilla.target_modules) == set(blocked.target_modules)
    assert blocked.use_bdlora.nblocks == 3


def test_table_aligns_numbers_right_and_text_left():
    table = format_table(("name", "bytes"), [("a", 12), ("long name", 1234567)])
    assert table.splitlines() == [
        "name           bytes",
        "---------  ---------",
        "a                 12",
        "long name  1,234,567",
    ]


def test_table_without_rows_has_its_headers():
    assert format_table(("a", "b"), []) == "a  b\n-  -"


def test_answer_is_indented_below_its_name():
    assert format_answer("base", "First.\nSecond.") == "      base  First.\n            Second."
