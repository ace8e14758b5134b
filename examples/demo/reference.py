"""What PEFT and transformers answer: the numbers that the Megatron side is held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
class Reference:
    """The answers of the base model and of every adapter.

    `prompt_ids[p]` are the tokens of `prompts[p]` in the chat format; `answers[name][p]` is its
    answer, where `name` is `"base"` or an adapter's name.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    answers: dict[str, list[Answer]]


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
        Full logits of the prompts and greedy answers.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = _load(base_dir, adapters)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    names = [BASE, *adapters]
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    with tqdm(total=len(names) * len(prompts), desc="PEFT reference", unit="answer") as bar:
        for name in names:
            with _active(model, name), torch.inference_mode():
                for ids in prompt_ids:
                    answers[name].append(_answer(model, ids, max_new_tokens))
                    bar.update()
    return Reference(prompts=list(prompts), prompt_ids=prompt_ids, answers=answers)


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


def _answer(model: PeftModel, prompt_ids: list[int], max_new_tokens: int) -> Answer:
    input_ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(input_ids)
    logits = model(input_ids=input_ids, attention_mask=mask).logits[0]
    generated = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    return Answer(logits=logits, token_ids=generated[0, len(prompt_ids) :].tolist())
