"""Questions with documents: how they are laid out, and what goes where a row is too short."""

from __future__ import annotations

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.train.rag import RagOptions
from tests.train.runs import make_tokenizer
from tests.unit.train.test_config import changed, problems
from tests.unit.train.test_examples import parts, read

FOX = {"title": "Fox", "text": "the fox jumps"}
DOG = {"text": "a lazy dog", "relevant": False}
RECORD = {"question": "who jumps", "documents": [FOX, DOG, "seven wizards"], "answer": "the fox"}
PROMPT = "[1] Fox\nthe fox jumps\n\n[2] \na lazy dog\n\n[3] \nseven wizards\n\nQuestion: who jumps"


def told(tmp_path, *records, seq_length=200, tokenizer=None, **options):
    tokenizer = tokenizer or make_tokenizer()
    options = {"rag": RagOptions(seq_length=seq_length, **options)}
    examples = read(tmp_path, tokenizer, records, "rag", seq_length=seq_length, **options)
    return [parts(tokenizer, example) for example in examples], examples


def test_a_record_is_a_chat_of_one_answer(tmp_path):
    (found,), _ = told(tmp_path, RECORD)
    assert found == [(False, f"<|user|>{PROMPT}<|end|><|assistant|>"), (True, "the fox<|end|>")]
    plain = make_tokenizer()
    plain.chat_template = None
    (found,), _ = told(tmp_path, RECORD, tokenizer=plain)
    assert found == [(False, PROMPT), (True, "the fox<|end|>")]


def test_templates_of_ones_own(tmp_path):
    options = {"document": "<{text}>", "prompt": "{question}? {documents}"}
    (found,), _ = told(tmp_path, {**RECORD, "documents": ["{x}", FOX]}, **options)
    assert found[0] == (False, "<|user|>who jumps? <{x}><the fox jumps><|end|><|assistant|>")


def test_documents_are_dropped_distractors_first_and_the_answer_stays(tmp_path, caplog):
    _, (whole,) = told(tmp_path, RECORD)
    gone = []
    for seq_length in range(len(whole), 12, -1):
        if len(gone) and len(gone[-1]) == 3:
            break
        (found,), (example,) = told(tmp_path, RECORD, seq_length=seq_length)
        assert len(example) <= seq_length
        said = found[0][1]
        assert "Question: who jumps<|end|>" in said
        assert found[1] == (True, "the fox<|end|>")
        texts = ("a lazy dog", "seven wizards", "the fox jumps")
        left = [text for text in texts if text in said]
        gone.append([text for text in texts if text not in left])
    with pytest.raises(ConfigError, match="question and answer alone are 1 positions over"):
        told(tmp_path, RECORD, seq_length=len(example) - 1)
    steps = [now for before, now in zip([None, *gone], gone, strict=False) if now != before]
    # The distractor, then the others from the end.
    assert steps == [
        [],
        ["a lazy dog"],
        ["a lazy dog", "seven wizards"],
        ["a lazy dog", "seven wizards", "the fox jumps"],
    ]
    assert "a document that is marked as not relevant was dropped" in caplog.text


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"documents": "text"}, "a list under 'documents'"),
        ({"documents": [{"title": "t"}]}, "document 1 is"),
        ({"documents": [3]}, "document 1 is 3; wanted text"),
        ({"answer": None}, "wanted text under 'question' and 'answer'"),
        ({"weight": 0}, "'weight' is not supported here"),
    ],
    ids=str,
)
def test_records_that_are_none(tmp_path, change, wanted):
    with pytest.raises(ConfigError, match=wanted):
        told(tmp_path, {**RECORD, **change})


def test_templates_that_leave_something_out_are_refused():
    (problem,) = problems(changed(dataset__rag={"prompt": "{question}"}))
    assert problem == (
        "dataset.rag.prompt names ['question']; wanted ['documents', 'question'], of "
        "['documents', 'question']"
    )
    (problem,) = problems(changed(dataset__rag={"document": "{text} {url"}))
    assert "dataset.rag.document is no template" in problem
