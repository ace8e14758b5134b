"""Two real PEFT adapters, each trained in well under a minute: vanilla LoRA and BD-LoRA."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bdlora_megatron.blocks import ModuleShape, matching_rank
from examples.demo.chat import encode_prompt
from examples.demo.texts import Example, python_reference, shakespeare

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
NUM_BLOCKS = 3  # SmolLM2-135M has three key-value heads, so three tensor-parallel ranks.
IGNORED = -100  # The label that the loss skips.

_NUM_HELD_OUT = 12
_BATCH_SIZE = 4
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 3
_RECORD = "training.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What one adapter is and what it learns."""

    lora: LoraConfig
    text_name: str
    read_text: Callable[[], list[Example]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRecord:
    """What became of one training run; kept beside the adapter that it made."""

    text_name: str
    rank: int
    num_parameters: int
    steps: int
    held_out_loss_before: float
    held_out_loss_after: float
    seconds: float


def recipes(base_config: Any) -> dict[str, Recipe]:
    """Return the demo's two adapters by name, for a Llama-like base model.

    BD-LoRA gets the largest rank with which it has no more parameters than vanilla LoRA. Alpha is
    twice the rank in both, so the scale is the same.
    """
    rank = 8
    blocked_rank = matching_rank(_target_shapes(base_config), lora_rank=rank, num_blocks=NUM_BLOCKS)
    blocks = block_diagonal(NUM_BLOCKS)
    return {
        "vanilla": Recipe(lora=_lora(rank), text_name="Shakespeare", read_text=shakespeare),
        "bdlora": Recipe(
            lora=_lora(blocked_rank, use_bdlora=blocks),
            text_name="Python reference",
            read_text=python_reference,
        ),
    }


def block_diagonal(num_blocks: int) -> BdLoraConfig:
    """PEFT's words for blocks that lie where tensor parallelism splits a Llama-like model."""
    return BdLoraConfig(
        target_modules_bd_a=list(ROW_PARALLEL),
        target_modules_bd_b=list(COLUMN_PARALLEL),
        nblocks=num_blocks,
    )


def _lora(rank: int, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[*COLUMN_PARALLEL, *ROW_PARALLEL],
        task_type="CAUSAL_LM",
        **options,
    )


def _target_shapes(base_config: Any) -> list[ModuleShape]:
    hidden, ffn = base_config.hidden_size, base_config.intermediate_size
    heads = base_config.num_attention_heads * base_config.head_dim
    groups = base_config.num_key_value_heads * base_config.head_dim
    column = [(hidden, heads), (hidden, groups), (hidden, groups), (hidden, ffn), (hidden, ffn)]
    row = [(heads, hidden), (ffn, hidden)]
    return [
        *(ModuleShape(in_features=i, out_features=o, blocked="B") for i, o in column),
        *(ModuleShape(in_features=i, out_features=o, blocked="A") for i, o in row),
    ]


def train_adapters(
    base_dir: Path, out_dir: Path, *, steps: int = 20, seed: int = 0
) -> dict[str, Path]:
    """Train each of `recipes` on the base model in `base_dir`.

    Args:
        base_dir: A Hugging Face model directory.
        out_dir: Where one directory per adapter is written, as PEFT saves it.
        steps: Optimiser steps for each adapter.
        seed: Seeds the adapters' weights and the choice of examples.

    Returns:
        The adapters' directories by name; `read_record` tells how each was trained.
    """
    paths = {}
    base_config = AutoConfig.from_pretrained(base_dir)
    for name, recipe in recipes(base_config).items():
        torch.manual_seed(seed)
        paths[name] = out_dir / name
        _train(name, recipe, base_dir=base_dir, out_dir=paths[name], steps=steps, seed=seed)
    return paths


def read_record(adapter_dir: Path) -> TrainingRecord:
    """Return how the adapter in `adapter_dir` was trained."""
    return TrainingRecord(**json.loads((adapter_dir / _RECORD).read_text("utf-8")))


def _train(
    name: str, recipe: Recipe, *, base_dir: Path, out_dir: Path, steps: int, seed: int
) -> None:
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(base, recipe.lora)
    held_out, training = _split(recipe.read_text(), steps=steps, seed=seed)
    held_out_batches = _batches(tokenizer, held_out)
    loss_before = mean_loss(model, held_out_batches)
    _run_steps(model, _batches(tokenizer, training), title=f"{name:8} on {recipe.text_name}")
    loss_after = mean_loss(model, held_out_batches)
    model.save_pretrained(out_dir)
    record = TrainingRecord(
        text_name=recipe.text_name,
        rank=recipe.lora.r,
        num_parameters=model.get_nb_trainable_parameters()[0],
        steps=steps,
        held_out_loss_before=loss_before,
        held_out_loss_after=loss_after,
        seconds=time.perf_counter() - started,
    )
    (out_dir / _RECORD).write_text(json.dumps(asdict(record), indent=2), "utf-8")


def _split(
    examples: Sequence[Example], *, steps: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the held-out examples and those of every training step, which may come up again."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    training = cycle(shuffled[_NUM_HELD_OUT:])
    return shuffled[:_NUM_HELD_OUT], list(islice(training, steps * _BATCH_SIZE))


def _batches(tokenizer: Any, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    starts = range(0, len(examples), _BATCH_SIZE)
    return [collate(tokenizer, examples[start : start + _BATCH_SIZE]) for start in starts]


def _run_steps(model: PeftModel, batches: Sequence[Mapping[str, Tensor]], *, title: str) -> None:
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - step / len(batches))
    )
    model.train()
    bar = tqdm(batches, desc=title, unit="step")
    for batch in bar:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def mean_loss(model: PeftModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the loss per answer token over all batches."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            # Labels shift by one, so the first position of a row never counts.
            num_tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
            total += model(**batch).loss.item() * num_tokens
            count += num_tokens
    return total / count


def collate(tokenizer: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return a right-padded batch whose labels cover the answers only."""
    rows = [_encode(tokenizer, example) for example in examples]
    length = max(len(ids) for ids, _ in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, tokenizer.pad_token_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, (ids, answer_start) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, answer_start : len(ids)] = torch.tensor(ids[answer_start:])
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    prompt_ids = encode_prompt(tokenizer, example.prompt)
    answer_ids = tokenizer(example.answer)["input_ids"]
    return [*prompt_ids, *answer_ids, tokenizer.eos_token_id], len(prompt_ids)
