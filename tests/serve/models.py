"""A tiny model with a tokenizer and a chat template, and adapters for it, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: The same, but for tools: their names, and calls between tags. A token here is a letter.
TOOL_CHAT = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "vanilla": {"r": 4},
    "blocks": {"r": 8, "use_bdlora": 4},
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
}


def make_tokenizer(folder: Path) -> int:
    """Save a tokenizer of the 256 bytes and two special tokens; returns how many those are."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(["<s>", "</s>", *bytes_])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    )
    fast.save_pretrained(folder)
    return len(vocab)


def make_model(folder: Path) -> Path:
    """A Llama of two layers with that tokenizer."""
    import transformers

    torch.manual_seed(7)
    vocab_size = make_tokenizer(folder)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return save_random(model, folder)


def save_random(model: Any, folder: Path) -> Path:
    """Save a model whose matrices are drawn wide enough that its answers differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """A LoRA or BD-LoRA whose B is not zero, saved by PEFT."""
    import peft
    import transformers

    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    blocks = settings.pop("use_bdlora", None)
    if blocks is not None:
        settings["use_bdlora"] = peft.BdLoraConfig(
            target_modules_bd_a=["o_proj", "down_proj"],
            target_modules_bd_b=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
            nblocks=blocks,
            match_strict=True,
        )
    config = peft.LoraConfig(
        **{"target_modules": "all-linear", "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings}
    )
    tuned = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder)
    return folder


def make(folder: Path) -> Path:
    """The model and all of ``ADAPTERS`` below a folder."""
    model = make_model(Path(folder) / "model")
    (model / "chat_template.jinja").write_text(TOOL_CHAT)
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_adapter(model, Path(folder) / "adapters" / name, seed=seed, **settings)
    return Path(folder)


@torch.no_grad()
def logits(tuned: Any, model: str, ids: list[int]) -> torch.Tensor:
    """Of the next token in every place, by PEFT's model of all adapters; ``[len(ids), vocab]``."""
    if model == "model":
        with tuned.disable_adapter():
            return tuned(torch.tensor([ids])).logits[0].double()
    tuned.set_adapter(model)
    return tuned(torch.tensor([ids])).logits[0].double()
