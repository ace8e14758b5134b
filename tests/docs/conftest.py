"""A tokenizer of eight words with a chat format."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "U", "A", "one", "two", "three", "four"]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )
    result.chat_template = (
        "{% for m in messages if m['content'] %}U {{ m['content'] }} {% endfor %}A"
    )
    return result
