"""The tutorials, followed from the first command to the last on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from examples.nemo import prepare as nemo_example
from tests.docs.commands import check_command
from tests.docs.follow import Reader
from tests.docs.pages import ROOT, blocks
from tests.harness import free_port
from tests.serve import models

#: Sizes of the tutorial's model that its text speaks of: three key-value heads.
SHAPE = {
    "hidden_size": 36,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}


def make_model(folder):
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=models.make_tokenizer(folder), bos_token_id=0, eos_token_id=1, **SHAPE
    )
    model = transformers.LlamaForCausalLM(config)
    return models.save_random(model, folder)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves, with a tiny model in the place of SmolLM2."""
    folder = tmp_path_factory.mktemp("demo")
    base = make_model(folder / ".demo" / "SmolLM2-135M-Instruct")
    for seed, (name, settings) in enumerate(
        {"vanilla": {"r": 8}, "bdlora": {"r": 12, "use_bdlora": 3}}.items()
    ):
        models.make_adapter(base, folder / ".demo" / "adapters" / name, seed=seed, **settings)
    return folder


@pytest.fixture
def port():
    return free_port()


@pytest.mark.timeout(900)
@pytest.mark.engine
def test_serve(demo, port):
    reader = Reader(folder=demo, port=port, skip=frozenset({"make demo"}))
    reader.follow("tutorials/serve.md")
    answers = [
        json.loads(line)
        for line in lines_of(reader)
        if line.startswith("{") and '"choices"' in line
    ]
    assert {answer["model"] for answer in answers} == {"poet", "pythonist"}
    (line,) = (demo / "answers.jsonl").read_text("utf-8").splitlines()
    generated = json.loads(line)
    assert generated["custom_id"] == "1"
    assert generated["response"]["status_code"] == 200
    assert generated["response"]["body"]["model"] == "poet"


@pytest.mark.timeout(900)
@pytest.mark.engine
def test_nemo_from_serving_on(tmp_path, port):
    base = nemo_example.make_base(tmp_path / "run" / "hf")
    adapter = tmp_path / "run" / "adapter" / "checkpoints" / "step=7-last" / "hf_adapter"
    models.make_adapter(base, adapter, seed=0, r=8, use_bdlora=2)
    reader = Reader(folder=tmp_path, port=port, start="## 5. Serve it")
    reader.follow("tutorials/nemo.md")
    (answer,) = (json.loads(p) for p in lines_of(reader) if p.startswith("{"))
    assert answer["model"] == "colours"
    assert answer["usage"]["completion_tokens"] > 0


def test_bridge_from_serving_on(tmp_path):
    """Its base model exists in Bridge's format alone: what is served is the reader's own."""
    base = make_model(tmp_path / "base")
    adapter = tmp_path / "run" / "adapter" / "hf_adapter"
    models.make_adapter(base, adapter, seed=0, r=8, use_bdlora=2)
    page = (ROOT / "docs" / "tutorials" / "bridge.md").read_text("utf-8")
    (serve,) = (
        command
        for block in blocks(page, "sh")
        for command in block.commands()
        if command.startswith("bdlora serve")
    )
    check_command(serve)
    reader = Reader(folder=tmp_path, port=0, start="## 4. Serve it", skip=frozenset({serve}))
    reader.follow("tutorials/bridge.md")


def lines_of(reader):
    return [line for printed in reader.printed.values() for line in printed.splitlines()]


@pytest.mark.parametrize("host", ["nemo", "bridge"])
def test_yaml_on_the_page_is_the_examples(host):
    page = (ROOT / "docs" / "tutorials" / f"{host}.md").read_text("utf-8")
    (shown,) = (yaml.safe_load(block.body) for block in blocks(page, "yaml"))
    example = yaml.safe_load((ROOT / "examples" / host / "bdlora.yaml").read_text("utf-8"))
    assert shown["peft"] == example["peft"]


def test_rank(tmp_path):
    Reader(folder=tmp_path, port=0, exact=True).follow("tutorials/rank.md")
