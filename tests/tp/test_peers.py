"""`benchmarks.peers` with a small model: our engine answers as PEFT's mixed batch does."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from benchmarks.peers.contenders import CONTENDERS, visit
from benchmarks.peers.files import make_adapters
from benchmarks.peers.job import Job, Load
from tests.serve.models import make_tokenizer


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    root = tmp_path_factory.mktemp("peers")
    base = root / "base"
    make_tokenizer(base)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(base)
    found = [Load(name="base", requests=_requests(root / "base.jsonl", 0))]
    with pytest.MonkeyPatch.context() as patch:
        # So few columns need larger factors to change a token.
        patch.setattr("benchmarks.peers.files._STD", 0.4)
        found += _adapter_loads(root, base)
    return base, found


def _adapter_loads(root, base):
    found = []
    for name, blocks in (("LoRA", None), ("BD-LoRA", 2)):
        folders = make_adapters(base, root / name, count=2, rank=4, num_blocks=blocks)
        requests = _requests(root / f"{name}.jsonl", 2)
        adapters = [str(folder) for folder in folders]
        found.append(Load(name=name, requests=requests, adapters=adapters))
    return found


def _requests(path, adapters):
    prompts = [[3, 5, 7], [11, 2, 90, 40, 41], [200, 100]]
    lines = [
        {"prompt": p, "max_tokens": 6, "adapter": i % adapters if adapters else -1}
        for i, p in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.engine
def test_every_contender_answers_alike(loads, tmp_path):
    base, chosen = loads
    answers = {}
    for contender in CONTENDERS:
        if contender.runner == "run_vllm":
            continue
        job = Job(
            base=str(base),
            dtype="float32",
            tp=contender.tp,
            layout=contender.layout,
            max_rank=4,
            repeats=1,
            loads=chosen if contender.blocks else chosen[:2],
        )
        found = visit(contender, job, tmp_path, threads=2, limit_s=200)
        assert not found.problem
        assert found.peak_bytes > 10**7
        answers[contender.name] = found.outcome["answers"]
        assert {len(times) for times in found.outcome["seconds"].values()} == {1}
    reference = answers.pop("PEFT, mixed batch")
    assert reference["LoRA"] != reference["base"], "adapters change answers"
    assert reference["BD-LoRA"] != reference["base"]
    for got in answers.values():
        assert got == {name: reference[name] for name in got}
    assert len(answers) == 3
