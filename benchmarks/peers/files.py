"""The inputs: a model whose heads divide, adapters, and files of requests.

SmolLM2-135M has 9 query heads in 3 groups, which neither vLLM nor this package splits over two
ranks. A fourth group whose weights are zero makes it 12 in 4 and changes no output: its values are
zero, so whatever it attends to adds nothing.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bdlora_megatron.blocks import matching_rank
from bdlora_megatron.convert import read_hf_config
from benchmarks.peers.job import Request
from examples.demo.texts import python_reference, shakespeare
from examples.demo.train import block_diagonal

__all__ = ["bd_rank", "make_adapters", "make_requests", "padded_base"]

_GROUPS = 4
_STD = 0.02


def padded_base(source: Path, folder: Path) -> Path:
    """Write the model with a fourth group of heads that computes nothing.

    Args:
        source: SmolLM2-135M.
        folder: Where to; kept if it is there.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    settings = small.config.to_dict()
    per_group = settings["num_attention_heads"] // settings["num_key_value_heads"]
    settings |= {"num_attention_heads": per_group * _GROUPS, "num_key_value_heads": _GROUPS}
    large = LlamaForCausalLM(LlamaConfig(**settings))
    weights = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.state_dict().items():
            parameter.zero_()
            given = weights[name]
            parameter[tuple(slice(size) for size in given.shape)] = given
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    large.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source).save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def bd_rank(base: Path, rank: int, num_blocks: int) -> int:
    """The rank of a BD-LoRA with as many parameters as a LoRA has."""
    shape = read_hf_config(base)
    return matching_rank(shape.module_shapes(), lora_rank=rank, num_blocks=num_blocks)


def make_adapters(
    base: Path, folder: Path, *, count: int, rank: int, num_blocks: int | None
) -> list[Path]:
    """Write adapters of all linear layers with random weights.

    Args:
        base: The model.
        folder: Where to; what is there is kept.
        count: How many.
        rank: Total rank of each.
        num_blocks: Blocks of a BD-LoRA; None for a vanilla LoRA.

    Returns:
        Their folders.
    """
    paths = [folder / f"a{number}" for number in range(count)]
    missing = [path for path in paths if not (path / "adapter_model.safetensors").exists()]
    if missing:
        more: dict[str, Any] = {}
        if num_blocks is not None:
            more["use_bdlora"] = block_diagonal(num_blocks)
        settings = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            **more,
        )
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings
        )
        for path in missing:
            _randomise(model, seed=int(path.name[1:]))
            model.save_pretrained(path)
    return paths


@torch.no_grad()
def _randomise(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=_STD, generator=generator)


def make_requests(
    base: Path, path: Path, *, count: int, adapters: int, lengths: tuple[int, int], answer: int
) -> Path:
    """Write prompts out of the demo's two texts; request i asks for adapter i mod ``adapters``.

    Args:
        base: The model, for its tokenizer.
        path: The file; replaced.
        count: Requests.
        adapters: Different adapters; 0 for the base model alone.
        lengths: Shortest and longest prompt, in tokens.
        answer: Tokens of each answer.

    Returns:
        The path.
    """
    rng = random.Random(0)
    tokens = _tokens(base)
    requests = []
    for number in range(count):
        length = rng.randint(*lengths)
        start = rng.randrange(len(tokens) - length)
        requests.append(
            Request(
                prompt=list(tokens[start : start + length]),
                max_tokens=answer,
                adapter=number % adapters if adapters else -1,
            )
        )
    path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in requests), "utf-8")
    return path


def _tokens(base: Path) -> Sequence[int]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "\n\n".join(_texts())
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _texts() -> Iterator[str]:
    for example in (*shakespeare()[:400], *python_reference()[:400]):
        yield f"{example.prompt}\n{example.answer}"
