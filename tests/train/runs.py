"""A tiny base model with a tokenizer, chats to learn, and settings for runs on them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from megatron.core import parallel_state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bdlora_megatron import runtime
from bdlora_megatron.errors import ConfigError
from bdlora_megatron.layers import collect_adapter, lora_layers
from bdlora_megatron.train import corpus
from bdlora_megatron.train.config import from_mapping
from bdlora_megatron.train.data import Batch, RowDataset, ShareOfBatch
from bdlora_megatron.train.examples import Documents, load_tokenizer
from bdlora_megatron.train.loop import train
from bdlora_megatron.train.schema import TrainConfig
from tests.tp.models import randomize_adapters

# A prime, so that every parallel size pads it.
VOCAB = 331
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards box their liquor jugs"
WORDS = TEXT.split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE
    )


def read_examples(paths: Any, tokenizer: Any, *, format: Any, **options: Any) -> corpus.Corpus:
    """The examples of some files, kept beside the first of them."""
    encoding = {
        name: options.pop(name) for name in ("vocab_size", "chats", "rag") if name in options
    }
    storage = corpus.Storage(cache_dir=Path(paths[0]).parent / "kept")
    documents = Documents(tokenizer, format, **encoding)
    return corpus.read_examples(paths, documents, storage=storage, **options)


def training_rows(config: TrainConfig) -> RowDataset:
    """The rows of a run's training data, whose examples are packed."""
    examples = read_examples(
        config.dataset.train,
        load_tokenizer(config.model.hf_path),
        format="chat",
        seq_length=config.model.seq_length,
        too_long="truncate",
    )
    return RowDataset(
        examples,
        config.model.seq_length,
        packing=True,
        seed=3,
        cp_size=config.model.context_parallel_size,
    )


def first_batches(config: TrainConfig, *, micro_batch_size: int) -> list[Batch]:
    """This rank's micro-batches of a step over the first four rows."""
    rows = training_rows(config)
    share = ShareOfBatch(
        global_batch_size=4,
        micro_batch_size=micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
    return [rows.batch(numbers) for numbers in share.numbers(0)]


def make_base(path: Path, *, family: str = "Llama", **changes: Any) -> Path:
    """Save a tiny random model that 1, 2 and 3 ranks can share."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 36,
        "intermediate_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
    }
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def write_chats(path: Path, count: int) -> Path:
    """Write chats of one to three turns and of very different lengths."""
    lines = []
    for number in range(count):
        messages = []
        for turn in range(1 + number % 3):
            start = (number + turn) % len(WORDS)
            said = " ".join(WORDS[start : start + 1 + number % 4])
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": said[::-1][: 3 + 2 * (number % 5)]})
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines), "utf-8")
    return path


def make_files(root: Path) -> Path:
    """A base model, training and validation data below ``root``."""
    make_base(root / "base")
    write_chats(root / "train.jsonl", 23)
    write_chats(root / "validation.jsonl", 5)
    return root


def settings(root: Path, save: Path, **changes: Any) -> TrainConfig:
    """Settings of a run on ``make_files``; ``changes`` are ``section__key`` or whole sections."""
    values: dict[str, Any] = {
        "model": {"hf_path": str(root / "base"), "seq_length": 48},
        "peft": {"bdlora": {"num_blocks": 6, "rank": 12}},
        "dataset": {
            "train": str(root / "train.jsonl"),
            "validation": str(root / "validation.jsonl"),
            "too_long": "truncate",
            "cache_dir": str(root / "kept"),
        },
        "train": {"train_iters": 6, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 0.02},
        "scheduler": {"lr_warmup_iters": 1, "lr_decay_iters": 8},
        "checkpoint": {"save": str(save), "save_interval": 2},
        "logger": {"progress_bar": False, "tensorboard": False, "loss_curve": False},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return from_mapping(values)


def randomize_gently(model: Any) -> None:
    """Random adapters; a violent update magnifies rounding from layer to layer."""
    randomize_adapters(model)
    for _, layer in lora_layers(model):
        for parameter in layer.adapter.parameters():
            parameter.data.mul_(0.3)


def collect_gradients(model: Any) -> dict[Any, Any]:
    """Every factor's gradient, put together from all ranks; in place of the factors."""
    for _, layer in lora_layers(model):
        for plan in layer.adapter.plans:
            for factor in layer.adapter.factors(plan):
                factor.weight.data = factor.weight.main_grad.clone()
    return dict(collect_adapter(model, "gradients").modules)


def train_rank(rank: int, world_size: int, config: TrainConfig) -> Any:
    """The body of a rank: a whole run."""
    runtime.enable_cpu()
    return train(config)


def train_each(rank: int, world_size: int, configs: list[TrainConfig]) -> list[tuple[Any, str]]:
    """The body of a rank: several runs one after another, each with what it gave and said."""
    told = []
    for config in configs:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                result = train_rank(rank, world_size, config)
            except ConfigError as error:
                result = error
        told.append((result, out.getvalue()))
    return told
