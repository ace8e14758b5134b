"""PEFT adapters for tests: made by the installed PEFT, or written by hand."""

from __future__ import annotations

import json
import warnings

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import BdLoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
LAYERS = 2
#: Widths that are all different, so that no two sides can be mistaken for each other.
HIDDEN, QUERY, KEY_VALUE, FFN = 48, 80, 40, 104
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, QUERY),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (QUERY, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN),
    "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}


def blocks(nblocks, *, a=ROW, b=COLUMN, **more):
    return BdLoraConfig(
        target_modules_bd_a=list(a), target_modules_bd_b=list(b), nblocks=nblocks, **more
    )


def tiny_llama(cls=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 31,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "tie_word_embeddings": False,
        # Without a name PEFT asks the hub about an embedding's size.
        "name_or_path": "",
    }
    return cls(LlamaConfig(**(settings | changes)))


def peft_model(*, cls=LlamaForCausalLM, base=None, dtype=torch.float32, **settings):
    """A PEFT model whose factors are all random, so that no update is zero."""
    config = LoraConfig(**({"target_modules": COLUMN + ROW, "r": 8, "lora_alpha": 12} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(cls, **(base or {})).to(dtype), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def vanilla_tensors(rank=8, layers=LAYERS, modules=WIDTHS, dtype=torch.float32):
    """The tensors of a vanilla adapter as PEFT names them."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(layers):
        for module in modules:
            width_in, width_out = WIDTHS[module]
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            for factor, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
                values = torch.randn(shape, generator=generator)
                tensors[f"{stem}{factor}.weight"] = values.to(dtype)
    return tensors


def write(folder, tensors=None, **config):
    """An adapter by hand: `tensors`, and a config of which `config` says what is special."""
    folder.mkdir()
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 12} | config
    (folder / "adapter_config.json").write_text(json.dumps(raw), "utf-8")
    save_file(
        vanilla_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors"
    )
    return folder
