"""Which tokens of a line are learnt, and what is no line."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.examples import load_tokenizer
from tests.train.runs import make_tokenizer, read_examples

CHAT = {
    "messages": [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "and the dog"},
        {"role": "assistant", "content": "is lazy"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def read(tmp_path, tokenizer, lines, format, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_examples([path], tokenizer, format=format, **{"seq_length": 64, **options})


def parts(tokenizer, example):
    """The text in stretches: (learnt or not, text)."""
    stretches: list[list] = []
    for token, learnt in zip(example.tokens.tolist(), example.learnt.tolist(), strict=True):
        if not stretches or stretches[-1][0] != learnt:
            stretches.append([learnt, []])
        stretches[-1][1].append(token)
    return [(learnt, tokenizer.decode(ids)) for learnt, ids in stretches]


def test_a_chat_is_learnt_where_the_assistant_speaks(tmp_path, tokenizer):
    (example,) = read(tmp_path, tokenizer, [CHAT], "chat")
    assert parts(tokenizer, example) == [
        (False, "<|user|>the fox<|end|><|assistant|>"),
        (True, "jumps<|end|>"),
        (False, "<|user|>and the dog<|end|><|assistant|>"),
        (True, "is lazy<|end|>"),
    ]
    rendered = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(example.tokens) == rendered


def test_a_completion_is_learnt_and_its_end(tmp_path, tokenizer):
    line = {"prompt": "the quick", "completion": " brown fox"}
    (example,) = read(tmp_path, tokenizer, [line], "prompt_completion")
    assert parts(tokenizer, example) == [(False, "the quick"), (True, " brown fox<|end|>")]


def test_a_text_is_learnt_whole_and_cut_without_losing_a_token(tmp_path, tokenizer):
    text = "the lazy dog jumps over the quick brown fox " * 4
    examples = read(tmp_path, tokenizer, [{"text": text}], "text", seq_length=10)
    assert len(examples) > 3
    assert all(len(example) <= 10 and example.learnt.all() for example in examples)
    # Each piece starts with the last token of the one before, from which it predicts.
    for before, after in pairwise(examples):
        assert before.tokens[-1] == after.tokens[0]
    ids = [examples[0].tokens[0], *(token for e in examples for token in e.tokens[1:])]
    assert tokenizer.decode(ids) == text + "<|end|>"


def test_long_examples_are_refused_cut_or_left_out(tmp_path, tokenizer, caplog):
    lines = [{"prompt": "a", "completion": "the fox " * 20}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigError, match=r"data\.jsonl line 1: \d+ positions, over model.seq_le"):
        read(tmp_path, tokenizer, lines, "prompt_completion", seq_length=8)
    cut = read(tmp_path, tokenizer, lines, "prompt_completion", seq_length=8, too_long="truncate")
    assert [len(example) for example in cut] == [8, 2]
    (kept,) = read(tmp_path, tokenizer, lines, "prompt_completion", seq_length=8, too_long="drop")
    assert len(kept) == 2
    assert (
        "1 examples are empty or longer than model.seq_length=8 and dropped; 0 have" in caplog.text
    )
    lines[0] = {"prompt": "the fox " * 20, "completion": "b"}
    read(tmp_path, tokenizer, lines, "prompt_completion", seq_length=8, too_long="truncate")
    assert (
        "0 examples are empty or longer than model.seq_length=8 and dropped; 1 have" in caplog.text
    )


@pytest.mark.parametrize(
    ("line", "format", "wanted"),
    [
        ({"text": "a"}, "chat", 'wanted {"messages"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat", "has the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "chat", "wanted a user's before"),
        ({"prompt": "a"}, "prompt_completion", r"wanted text under 'completion'.*found \['prompt"),
        ({"text": 3}, "text", "wanted text under 'text'"),
        ([1], "text", "found list"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, format, wanted):
    with pytest.raises(ConfigError, match=rf"1 line.*\n- .*data.jsonl line 1: .*{wanted}"):
        read(tmp_path, tokenizer, [line], format)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    with pytest.raises(ConfigError, match="No such file"):
        read_examples([path], tokenizer, format="text", seq_length=8)
    path.write_text('{"text": "a"\n' * 12)
    with pytest.raises(ConfigError, match=r"(?s)12 line.*line 1: not JSON.*and 4 more"):
        read_examples([path], tokenizer, format="text", seq_length=8)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_examples([path], tokenizer, format="text", seq_length=8)
    path.write_text("")
    with pytest.raises(ConfigError, match="no example with a token to learn"):
        read_examples([path], tokenizer, format="text", seq_length=8)
    with pytest.raises(ConfigError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
