"""Text as its tokens come: whatever the cuts, it is the text of all tokens, cut at the stop."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve.api.text import TextStream, Tokenizer
from bdlora_megatron.serve.messages import Choice, Token
from tests.serve.models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(str(folder))


@pytest.fixture(scope="module")
def pieced(tmp_path_factory):
    """A tokenizer with sentencepiece's habits: words with their space, bytes for all else."""
    letters = ["\u2581", "a", "b", "\u2581a", "\u2581b"]
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    model = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[("\u2581", "a"), ("\u2581", "b")],
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    parts = tokenizers.decoders
    made.decoder = parts.Sequence(
        [parts.Replace("\u2581", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("pieced")
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return Tokenizer(str(folder))


def deltas(tokenizer, prompt, ids, stop, finish="length", **more):
    stream, shown = TextStream(tokenizer, prompt, stop, **more), []
    for place, token in enumerate(ids):
        last = finish if place == len(ids) - 1 else None
        delta = stream.push(Token(1, Choice(token), last))
        if delta is not None:
            shown.append(delta)
            if delta.finish is not None:
                break
    return shown


def cut(text, stop):
    """What stands before the stop text that is complete first; of two, before the longer one."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(found)[1]], "stop") if found else (text, "length")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abä€𝄞 ", min_size=1, max_size=24),
    stop=st.lists(st.text(alphabet="abä€", min_size=1, max_size=3), max_size=3),
    prompt=st.text(alphabet="aä€", max_size=3),
)
@example(text="bab", stop=["bab", "a"], prompt="")
def test_pieces_add_up_to_the_text_cut_at_the_first_stop(tokenizer, text, stop, prompt):
    """One byte a token, so that characters and stop texts are torn at every place."""
    ids = tokenizer.encode(text)
    shown = deltas(tokenizer, tokenizer.encode(prompt), ids, stop)
    expected, finish = cut(text, stop)
    assert "".join(delta.text for delta in shown) == expected
    assert shown[-1].finish == finish
    assert all(delta.finish is None for delta in shown[:-1])
    taken = [choice.token for delta in shown for choice in delta.choices]
    assert taken == ids[: len(taken)]
    assert finish == "stop" or taken == ids


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet="ab", min_size=1, max_size=24),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=3),
    least=st.integers(0, 12),
)
@example(text="aba", stop=["b", "bab"], least=2)
def test_a_stop_text_that_is_whole_too_early_ends_nothing(tokenizer, text, stop, least):
    """One character a token: the first stop text that ends beyond the least length cuts."""
    shown = deltas(tokenizer, [], tokenizer.encode(text), stop, min_tokens=least)
    expected, finish = text, "length"
    for end in range(least + 1, len(text) + 1):
        found = [len(s) for s in stop if text[:end].endswith(s)]
        if found:
            expected, finish = text[: end - max(found)], "stop"
            break
    assert "".join(delta.text for delta in shown) == expected
    assert shown[-1].finish == finish


def test_text_is_shown_as_soon_as_it_can_no_longer_be_a_stop(tokenizer):
    shown = deltas(tokenizer, [], tokenizer.encode("abcabd"), ["abd"])
    assert [delta.text for delta in shown] == ["abc", ""]
    assert shown[-1].finish == "stop"


def test_a_torn_character_at_the_end_is_told_as_such(tokenizer):
    ids = tokenizer.encode("a€")[:-1]
    assert "".join(delta.text for delta in deltas(tokenizer, [], ids, [])) == "a\ufffd"


def test_a_token_is_spelt_as_it_is_within_a_text(tokenizer, pieced):
    """Clients join the tokens of an answer, and count in them where each begins."""
    for each, first in ((tokenizer, ""), (pieced, " ")):
        ids = each.encode("ab b a ab")
        assert "".join(each.spell(i) for i in ids) == first + "ab b a ab"
        assert each.spell(1) == "</s>"
    assert [pieced.spell(i) for i in pieced.encode("a b")] == [" a", " b"]


def test_the_bytes_of_torn_characters_make_them_whole(tokenizer, pieced):
    text = "ä \ufffd 𝄞 a\n\x7f\xad"
    for each, first in ((tokenizer, ""), (pieced, " ")):
        ids = each.encode(text)
        assert each.spell(each.encode("ä")[-1]) == "\ufffd"
        assert b"".join(each.spell_bytes(i) for i in ids).decode() == first + text
        assert each.spell_bytes(1) == b"</s>"


def test_the_end_token_has_no_text(tokenizer):
    ids = [*tokenizer.encode("ab"), *tokenizer.stop_ids]
    shown = deltas(tokenizer, [], ids, [], finish="stop")
    assert "".join(delta.text for delta in shown) == "ab"
    assert shown[-1].finish == "stop"
    assert sum(len(delta.choices) for delta in shown) == 3


def test_all_end_tokens_that_the_model_names_count(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert Tokenizer(str(tmp_path)).stop_ids == {1, 5, 9}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ConfigError, match="generation_config"):
        Tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer(str(tmp_path))
