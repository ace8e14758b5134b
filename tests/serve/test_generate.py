"""`bdlora generate`: a file in, a file out, in order, with what was wrong told line by line."""

from __future__ import annotations

import argparse
import json

import pytest

from bdlora_megatron.errors import ConfigError
from bdlora_megatron.serve import generate
from tests.serve import models
from tests.serve.conftest import SIZES

pytestmark = pytest.mark.engine


def run(folder, source, target, *more):
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    names = [f"{name}={folder / 'adapters' / name}" for name in models.ADAPTERS]
    return generate.run(
        parser.parse_args(
            ["generate", str(source), str(target), "--model", str(folder / "model"), "--cpu",
             "--adapters", *names, "--set", *SIZES, *more]
        )
    )  # fmt: skip


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
    lines += ["", json.dumps(chat), "{not json", json.dumps({"prompt": "x", "temperatur": 0})]
    lines += [json.dumps({"prompt": "x", "model": "nobody"}), json.dumps([1])]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    assert run(folder, source, target) == 1
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [a["line"] for a in answers] == [*range(1, 61), 62, 63, 64, 65, 66]
    assert [a["custom_id"] for a in answers[:60]] == [f"id{i}" for i in range(60)]
    for i, answer in enumerate(answers[:60]):
        assert answer["response"]["model"] == names[i % 4]
        assert 1 <= answer["response"]["usage"]["completion_tokens"] <= 1 + i % 7
    assert answers[60]["response"]["object"] == "chat.completion"
    wrong = [a["error"]["message"] for a in answers[61:]]
    for message, says in zip(wrong, ["JSON", "temperatur", "nobody", "object"], strict=True):
        assert says in message
    assert not target.with_name("out.jsonl.partial").exists()
    assert "65/65" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="--overwrite"):
        run(folder, source, target)
