"""One user turn in the base model's chat format."""

from __future__ import annotations

from typing import Any


def encode_prompt(tokenizer: Any, message: str) -> list[int]:
    """Return the tokens of a chat in which the user said `message` and the answer comes next."""
    # The template's own system prompt would be a third of what the adapters are trained on.
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
