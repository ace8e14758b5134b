"""The inputs and the report of `benchmarks.peers`, and what becomes of a contender that fails."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from benchmarks.peers.contenders import CONTENDERS, Contender, Visit, visit
from benchmarks.peers.files import make_adapters, make_requests, padded_base
from benchmarks.peers.job import Job, Load, Outcome, read_requests, timed
from benchmarks.peers.report import agreement, summarise, write_report
from tests.serve.models import make_tokenizer

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with 3 groups of 3 heads, as SmolLM2-135M has, and its padded form."""
    root = tmp_path_factory.mktemp("peers")
    make_tokenizer(root / "small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root / "small")
    padded_base(root / "small", root / "padded")
    return root


def _logits(folder):
    with torch.inference_mode():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_the_padded_model_is_the_same_function(model):
    padded = transformers.AutoConfig.from_pretrained(model / "padded")
    assert (padded.num_attention_heads, padded.num_key_value_heads) == (12, 4)
    torch.testing.assert_close(_logits(model / "padded"), _logits(model / "small"))


def test_adapters_differ_and_change_the_model(model):
    from peft import PeftModel

    found = {}
    for blocks in (None, 2):
        folders = make_adapters(
            model / "padded", model / f"n{blocks}", count=2, rank=4, num_blocks=blocks
        )
        for folder in folders:
            base = transformers.AutoModelForCausalLM.from_pretrained(model / "padded")
            with torch.inference_mode():
                found[folder] = PeftModel.from_pretrained(base, folder)(IDS).logits
        written = [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
        make_adapters(model / "padded", model / f"n{blocks}", count=2, rank=4, num_blocks=blocks)
        assert written == [
            (folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders
        ]
    logits = [_logits(model / "padded"), *found.values()]
    for number, one in enumerate(logits):
        for other in logits[:number]:
            assert not torch.allclose(one, other, atol=1e-3)


def test_requests_take_adapters_in_turn(model, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.peers.files._texts", lambda: iter(["abc def " * 40]))
    options = {"count": 7, "lengths": (3, 9), "answer": 5}
    path = make_requests(model / "small", tmp_path / "r", adapters=3, **options)
    found = read_requests(str(path))
    assert [request.adapter for request in found] == [0, 1, 2, 0, 1, 2, 0]
    assert {request.max_tokens for request in found} == {5}
    assert {3 <= len(request.prompt) <= 9 for request in found} == {True}
    path = make_requests(model / "small", tmp_path / "b", adapters=0, **options)
    base = read_requests(str(path))
    assert {request.adapter for request in base} == {-1}
    assert [r.prompt for r in base] == [r.prompt for r in found], "the same prompts"


def _job(tmp_path, **changes):
    (tmp_path / "requests").write_text('{"prompt": [1, 2], "max_tokens": 2, "adapter": -1}\n')
    loads = [Load(name="base", requests=str(tmp_path / "requests"))]
    settings = {"base": "nowhere", "dtype": "float32", "tp": 1, "layout": "", "max_rank": 4}
    return Job(**{**settings, "repeats": 2, "loads": loads, **changes})


def test_the_first_run_is_not_timed(tmp_path):
    clock = iter([1.0, 3.0, 10.0, 15.0])
    outcome, asked = Outcome(versions={}, start_s=0.0), []

    def answer(load, requests):
        asked.append(load.name)
        return [[len(asked)] * 2 for _ in requests]

    timed(_job(tmp_path), outcome, answer, lambda: next(clock))
    assert asked == ["base"] * 3
    assert outcome.seconds == {"base": [2.0, 5.0]}
    assert outcome.answers == {"base": [[3, 3]]}
    with pytest.raises(SystemExit, match=r"answers of \[1\] tokens; wanted \[2\]"):
        timed(_job(tmp_path), outcome, lambda load, requests: [[7]], lambda: 0.0)


def test_a_contender_that_fails_is_reported(tmp_path):
    wrong = visit(CONTENDERS[0], _job(tmp_path, tp=2), tmp_path, threads=1, limit_s=60)
    assert wrong.outcome is None
    assert "PEFT's mixed batch runs in one process" in wrong.problem
    slow = visit(CONTENDERS[0], _job(tmp_path), tmp_path, threads=1, limit_s=0.01)
    assert slow.problem == "not ready after 0 s"
    page = write_report(tmp_path / "out", [*_visits(), wrong], FACTS)
    assert "PEFT, mixed batch failed: `tp=2" in page


FACTS = {
    "command": "python -m x",
    "seconds": 9.0,
    "load_before": 0.5,
    "dtype": "float32",
    "requests": 2,
    "answer": 3,
    "threads": 2,
    "ranks": {"LoRA": 16, "BD-LoRA": 22},
    "num_blocks": 2,
    "prompt": [1, 2],
}


def _visits():
    def one(name, seconds, answers, peak):
        outcome = {
            "versions": {name: "1"},
            "start_s": 1.0,
            "seconds": {"base": seconds},
            "answers": {"base": answers},
        }
        return Visit(
            contender=Contender(name=name, runner="x"),
            outcome=outcome,
            problem="",
            peak_bytes=peak,
            seconds=1.0,
        )

    wanted = [[1, 2, 3], [4, 5, 6]]
    return [
        one("PEFT, mixed batch", [1.0, 2.0], wanted, 5),
        one("other", [0.5], [[1, 2, 3], [4, 0, 6]], 10**6),
        one("other", [1.5], wanted, 2 * 10**6),
    ]


def test_the_report_takes_all_processes_of_a_contender_together(tmp_path):
    reference, other = summarise(_visits(), tokens=6)
    assert reference["tokens_per_s"] == [6.0, 3.0]
    assert other["tokens_per_s"] == [12.0, 4.0]
    assert other["peak_bytes"] == 2 * 10**6
    assert (other["same_answers"], other["same_tokens"]) == (1, 4)
    page = write_report(tmp_path / "out", _visits(), FACTS)
    # 0.5 and 1.5 seconds for 3 tokens of each answer.
    assert "| other | 8 (4 to 12) | 333 (167 to 500) | 1 of 2 | 2 MB | 1 |" in page
    assert json.loads((tmp_path / "out.json").read_text())["rows"][1]["seconds"] == [0.5, 1.5]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_agreement_ends_at_the_first_difference():
    same = agreement([[1, 9, 3], [4, 5]], [[1, 2, 3], [4, 5]])
    assert same == {"same_answers": 1, "answers": 2, "same_tokens": 3, "tokens": 5}
    with pytest.raises(ValueError, match="longer"):
        agreement([[1]], [[1, 2]])
