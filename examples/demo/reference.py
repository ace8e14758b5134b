"""What PEFT and transformers answer: the numbers that the Megatron side is held against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.chat import encode_prompt

BASE = "base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one model makes of one prompt.

    `logits` are those of every prompt token, `[tokens, vocabulary]` in fp32; `token_ids` are the
    greedy answer, its end-of-turn token included.
    """

    logits: Tensor
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How long one way to generate all answers took, prompts included.

    `tokens` are those of the answers, without what pads the shorter ones; `passes` is how often the
    model ran for them.
    """

    name: str
    tokens: int
    passes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """The answers of the base model and of every adapter.

    `prompt_ids[p]` are the tokens of `prompts[p]` in the chat format; `answers[name][p]` is its
    answer, where `name` is `"base"` or an adapter's name. `speeds` are those of the two ways in
    which PEFT can generate them.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    answers: dict[str, list[Answer]]
    speeds: list[Speed]


def peft_reference(
    base_dir: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
) -> Reference:
    """Run the base model and every adapter on every prompt with PEFT, in fp32, without sharding.

    Args:
        base_dir: A Hugging Face model directory.
        adapters: PEFT adapter directories by name.
        prompts: What the user says; each is put in the model's chat format.
        max_new_tokens: Greedy answers stop here at the latest.

    Returns:
        Full logits of the prompts and greedy answers, and the time of the answers one after another
        and of those in PEFT's own mixed batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = _load(base_dir, adapters)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    names = [BASE, *adapters]
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    seconds = 0.0
    with tqdm(total=len(names) * len(prompts), desc="PEFT reference", unit="answer") as bar:
        for name in names:
            with _active(model, name), torch.inference_mode():
                for ids in prompt_ids:
                    logits = _logits(model, ids)
                    started = time.perf_counter()
                    token_ids = _generate(model, [ids], max_new_tokens)[0]
                    seconds += time.perf_counter() - started
                    answers[name].append(Answer(logits=logits, token_ids=token_ids))
                    bar.update()
    tokens = sum(len(answer.token_ids) for given in answers.values() for answer in given)
    return Reference(
        prompts=list(prompts),
        prompt_ids=prompt_ids,
        answers=answers,
        speeds=[
            Speed(name="PEFT, one after another", tokens=tokens, passes=tokens, seconds=seconds),
            _mixed_speed(model, names, prompt_ids, max_new_tokens),
        ],
    )


def _load(base_dir: Path, adapters: Mapping[str, Path]) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    (first, first_dir), *others = adapters.items()
    model = PeftModel.from_pretrained(base, first_dir, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, name)
    return model.eval()


@contextmanager
def _active(model: PeftModel, name: str) -> Iterator[None]:
    if name == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


def _mixed_speed(
    model: PeftModel, names: Sequence[str], prompt_ids: Sequence[list[int]], max_new_tokens: int
) -> Speed:
    rows = [(name, ids) for name in names for ids in prompt_ids]
    # PEFT's name for rows without an adapter.
    used = ["__base__" if name == BASE else name for name, _ in rows]
    started = time.perf_counter()
    with torch.inference_mode():
        answers = _generate(model, [ids for _, ids in rows], max_new_tokens, adapter_names=used)
    seconds = time.perf_counter() - started
    lengths = [len(answer) for answer in answers]
    return Speed(
        name="PEFT, one mixed batch", tokens=sum(lengths), passes=max(lengths), seconds=seconds
    )


def _logits(model: PeftModel, prompt_ids: list[int]) -> Tensor:
    input_ids = torch.tensor([prompt_ids])
    logits: Tensor = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return logits[0]


def _generate(
    model: PeftModel, prompts: Sequence[list[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy answers, their end-of-turn tokens included; padding is on the left."""
    longest = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    input_ids = torch.full((len(prompts), longest), 0 if pad is None else pad)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )
    return [_until_end(row, model) for row in generated[:, longest:].tolist()]


def _until_end(token_ids: list[int], model: PeftModel) -> list[int]:
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    length = next((at + 1 for at, token in enumerate(token_ids) if token in ends), len(token_ids))
    return token_ids[:length]
