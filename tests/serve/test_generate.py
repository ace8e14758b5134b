"""`bdlora generate`: OpenAI's batch format in and out, in order, with what was wrong by line."""

from __future__ import annotations

import argparse
import json

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve import generate
from tests.serve import models
from tests.serve.conftest import SIZES

pytestmark = pytest.mark.engine


def run(folder, source, target, *more, extra=()):
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    names += [f"{path.name}={path}" for path in extra]
    return generate.run(
        parser.parse_args(
            ["generate", str(source), str(target), "--model", str(folder / "model"), "--cpu",
             "--adapters", *names, "--set", *SIZES, *more]
        )
    )  # fmt: skip


def batch(custom_id, path, body):
    """A line of OpenAI's batch format."""
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": f"/v1/{path}", "body": body}
    )


def test_a_file_is_answered_in_order(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = ["model", *models.ADAPTERS]
    lines = [
        json.dumps(
            {"model": names[i % 4], "prompt": f"line {i}", "max_tokens": 1 + i % 7,
             "temperature": 0, "custom_id": f"id{i}"}
        )
        for i in range(60)
    ]  # fmt: skip
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    lines += ["", batch("chat", "chat/completions", chat), json.dumps(chat)]
    text = {"model": "blocks", "prompt": "x", "max_tokens": 2, "temperatur": 0}
    lines += [batch("text", "completions", text)]
    # Its prompt does not invoke it.
    activated = models.make_adapter(
        folder / "model", tmp_path / "activated", seed=5, r=4, alora_invocation_tokens=[7, 8, 9]
    )
    same = {"model": "activated", "prompt": "line 4", "max_tokens": 5, "temperature": 0}
    lines += [batch("activated", "completions", same)]
    # Requests that are refused, then lines that are none.
    lines += [
        batch("a", "completions", {"prompt": "x", "model": "nobody"}),
        batch("b", "completions", {"prompt": "x", "suffix": "y"}),
        batch("\ud83d", "completions", {"prompt": "x \ud83d"}),
        batch("d", "completions", {"prompt": "x", "stream": True}),
        "{not json", json.dumps([1]), batch("e", "embeddings", {"input": "x"}),
        json.dumps({"custom_id": "f", "method": "GET", "url": "/v1/completions", "body": {}}),
    ]  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # With a byte-order mark, as some editors leave it.
    source.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    assert run(folder, source, target, extra=[activated]) == 1
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert all(set(a) == {"id", "custom_id", "response", "error"} for a in answers)
    assert len({a["id"] for a in answers}) == len(answers) == 72
    assert [a["custom_id"] for a in answers] == [
        *(f"id{i}" for i in range(60)),
        "chat", None, "text", "activated", "a", "b", "\ud83d", "d", None, None, "e", "f",
    ]  # fmt: skip
    for answer in answers[:68]:
        assert answer["error"] is None
        assert set(answer["response"]) == {"status_code", "request_id", "body"}
    good, refused = answers[:64], answers[64:68]
    assert all(a["response"]["status_code"] == 200 for a in good)
    for i, answer in enumerate(good[:60]):
        assert answer["response"]["body"]["model"] == names[i % 4]
        assert 1 <= answer["response"]["body"]["usage"]["completion_tokens"] <= 1 + i % 7
    asked, alone, written, base = (a["response"]["body"] for a in good[60:])
    assert base["choices"] == good[4]["response"]["body"]["choices"]
    assert asked["object"] == alone["object"] == "chat.completion"
    assert asked["choices"] == alone["choices"]
    assert written["model"] == "blocks"
    assert [a["response"]["status_code"] for a in refused] == [404, 400, 400, 400]
    wrong = [a["response"]["body"]["error"]["message"] for a in refused]
    for message, says in zip(wrong, ["nobody", "suffix", "surrogate", "stream"], strict=True):
        assert says in message
    for answer, says in zip(answers[68:], ["line 70", "object", "embeddings", "GET"], strict=True):
        assert answer["response"] is None
        assert answer["error"]["code"] == "invalid_json_line"
        assert says in answer["error"]["message"]
    assert not target.with_name("out.jsonl.partial").exists()
    told = capfd.readouterr().err
    assert "72/72" in told
    assert "without effect: temperatur (lines: 1), model (lines: 1)" in told
    with pytest.raises(ConfigError, match="--overwrite"):
        run(folder, source, target)
