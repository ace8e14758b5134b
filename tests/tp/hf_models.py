"""Tiny random Hugging Face models of odd sizes, one for each thing in which families differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB, SEQUENCE = 53, 13

# Hidden size, heads x head_dim and MLP width all differ, so that no transposed or mixed-up tensor
# fits; the vocabulary is a prime.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
#: Phi-3 has no head width of its own.
PHI3 = {"hidden_size": 64, "head_dim": None, "tie_word_embeddings": False, "pad_token_id": 0}
# Head width follows from the hidden size: 48 / 8.
PLAIN_HEADS = {"hidden_size": 48, "head_dim": None}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {**PLAIN_HEADS, "tie_word_embeddings": True}),
    "llama-no-gqa": ("Llama", {**PLAIN_HEADS, "num_key_value_heads": None}),
    "llama-few-kv": ("Llama", {"num_key_value_heads": 2}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama-attention-biases": ("Llama", {"attention_bias": True}),
    "llama-mlp-biases": ("Llama", {"mlp_bias": True, "num_key_value_heads": 8}),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}),
    "llama3-other-limits": (
        "Llama",
        {
            "rope_parameters": {
                **LLAMA3_ROPE,
                "high_freq_factor": 9.0,
                "original_max_position_embeddings": 32,
            },
            "head_dim": 32,
        },
    ),
    "yarn": ("Qwen2", {"rope_parameters": YARN, "head_dim": 16}),
    "phi3": ("Phi3", PHI3),
    "phi3-partial": (
        "Phi3",
        {**PHI3, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": (
        "Phi3",
        {
            **PHI3,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.5,
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.5],
                "long_factor": [3.0, 9.0],
            },
        },
    ),
    "linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 4}),
    "mistral-window": ("Mistral", {"sliding_window": SEQUENCE}),
    "qwen2": ("Qwen2", {**PLAIN_HEADS, "rms_norm_eps": 1e-3}),
    "qwen2-tied": ("Qwen2", {**PLAIN_HEADS, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
}


def make_model(kind: str, folder: Path, **save: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a random model; return token ids ``[2, S]`` and its logits ``[2, S, vocab]``."""
    name, changes = CASES[kind]
    settings = {key: v for key, v in {**SIZES, **changes}.items() if v is not None}
    if "sliding_window" in changes:
        settings["sliding_window"] = changes["sliding_window"]
    if kind == "llama-no-gqa":
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    torch.manual_seed(5)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = model_class(getattr(transformers, f"{name}Config")(**settings)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms start at one and biases at zero, which would hide that they are not read.
            spread = torch.rand_like(parameter) - 0.5
            parameter.copy_(1 + spread if "norm" in parameter_name else 0.6 * spread)
        ids = torch.randint(0, VOCAB, (2, SEQUENCE))
        logits = model(ids).logits
    model.save_pretrained(folder, **save)
    return ids, logits
