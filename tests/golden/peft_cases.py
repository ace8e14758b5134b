"""A tiny Llama and adapters of every kind, made by the installed PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from transformers import AutoModelForCausalLM

VOCAB, NUM_LAYERS = 101, 2
COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]


def blocks(nblocks: int, **more: Any) -> BdLoraConfig:
    lists = {"target_modules_bd_a": ROW, "target_modules_bd_b": COLUMN}
    return BdLoraConfig(**{**lists, "nblocks": nblocks, **more})


#: Settings of PEFT's LoraConfig by a name for what they exercise.
KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {"r": 6, "lora_alpha": 12},
    "bdlora2": {"r": 8, "lora_alpha": 16, "use_bdlora": blocks(2)},
    "bdlora4": {"r": 8, "lora_alpha": 16, "use_bdlora": blocks(4)},
    "rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True},
    "bdlora_rslora": {"r": 8, "lora_alpha": 8, "use_rslora": True, "use_bdlora": blocks(4)},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"k_proj": 20, "down_proj": 2},
    },
    "bdlora_patterns": {
        "r": 8,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 16},
        "alpha_pattern": {"o_proj": 24},
        "use_bdlora": blocks(4),
    },
    "some_modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "some_layers": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
    "partly_blocked": {
        "r": 8,
        "lora_alpha": 8,
        "use_bdlora": blocks(2, target_modules_bd_b=["q_proj", "up_proj"], match_strict=False),
    },
}


def make_base(path: Path, *, family: str = "Llama", **changes: Any) -> Path:
    """Save a tiny random model: grouped queries, an odd vocabulary, norms that are not one."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
    }
    config = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    return path


def make_adapter(base: Path, path: Path, **settings: Any) -> None:
    """Save an adapter whose two factors are both random, so that it changes the output."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"target_modules": COLUMN + ROW, "task_type": "CAUSAL_LM", **settings}),
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def peft_logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """Logits in fp32 of the base model, or of PEFT's own adapter on it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()(token_ids()).logits
