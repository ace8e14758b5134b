"""Every YAML of ``examples/train`` runs, on a tiny base and a few records of the data it names."""

from __future__ import annotations

import pytest
from peft import PeftConfig

from bdlora_megatron.train import load_config
from examples.train import data
from tests.harness import run_ranks
from tests.train.runs import make_base, make_tokenizer, train_rank
from tests.unit.train.test_chats import CALLS

CONFIGS = ("long_rows", "python_lora", "rag", "shakespeare_bdlora", "tools")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    make_base(root / "base", max_position_embeddings=512)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLS
    tokenizer.save_pretrained(root / "base")
    topics = [(title, text[-120:]) for title, text in data.python_topics().items()][:20]
    chats = data.python_reference()[:40]
    data.write_chats(chats, root / "data" / "shakespeare", at_most=20)
    data.write_chats(chats, root / "data" / "python", at_most=20)
    data.write_records(data.rag_records(topics), root / "data" / "rag")
    data.write_records(data.tool_records(topics), root / "data" / "tools")
    data.write_records([{"text": text} for _, text in topics], root / "data" / "topics")
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_trains_and_exports(root, name):
    config = load_config(f"examples/train/{name}.yaml")
    folder = root / "data" / config.dataset.train[0].split("/")[2]
    save = root / "runs" / name
    config = load_config(
        f"examples/train/{name}.yaml",
        [
            f"model.hf_path={root / 'base'}",
            "model.seq_length=512",
            f"dataset.train={folder / 'train.jsonl'}",
            f"dataset.validation={folder / 'validation.jsonl'}",
            f"dataset.cache_dir={root / 'kept'}",
            *(["train.epochs=3"] if config.train.epochs else ["train.train_iters=2"]),
            "scheduler.lr_warmup_iters=0",
            f"checkpoint.save={save}",
            "checkpoint.save_interval=0",
            "logger.tensorboard=false",
            "logger.loss_curve=false",
            "logger.progress_bar=false",
        ],
    )
    (result,) = run_ranks(1, train_rank, config)
    # Of 4 records, in at most as many rows; four of them make a step.
    assert result.steps == (3 if name == "tools" else 2)
    assert 0 < result.validation_loss < 10
    assert PeftConfig.from_pretrained(save / "adapter").peft_type == "LORA"
