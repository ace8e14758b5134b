"""A small random Llama and adapters for it, made on the spot, and what PEFT computes with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

__all__ = ["ADAPTERS", "VOCAB", "Reference", "make_adapter", "make_base"]

VOCAB = 512
_COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
_ROW = ["o_proj", "down_proj"]


def _blocks(count: int) -> dict[str, Any]:
    return {
        "use_bdlora": BdLoraConfig(
            target_modules_bd_a=_ROW, target_modules_bd_b=_COLUMN, nblocks=count
        )
    }


#: PEFT's settings by the adapters' names: of different rank, vanilla and BD-LoRA.
ADAPTERS: dict[str, dict[str, Any]] = {
    "vanilla4": {"r": 4},
    "vanilla16": {"r": 16},
    "attention": {"r": 3, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "blocks2": {"r": 8, **_blocks(2)},
    "blocks4": {"r": 24, **_blocks(4)},
}


def make_base(folder: Path) -> Path:
    """Save a Llama of three layers, drawn wide enough that its answers differ.

    Args:
        folder: Where to.

    Returns:
        The folder.
    """
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        # Attention's kernels take multiples of 16 or 32.
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                spread = 1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.normal_(std=spread)
            else:
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int, **settings: Any) -> Path:
    """Save an adapter, by PEFT, that changes each product by about a third.

    Args:
        base: The model's folder.
        folder: Where to.
        seed: Of its factors.
        **settings: PEFT's.

    Returns:
        The folder.
    """
    settings = {"target_modules": _COLUMN + _ROW, "task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(lora_alpha=2 * settings["r"], **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.normal_(std=0.25 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


class Reference:
    """PEFT's own model with all adapters, on the device."""

    def __init__(
        self, base: Path, adapters: dict[str, Path], dtype: torch.dtype, *, device: str
    ) -> None:
        """Load.

        Args:
            base: The model's folder.
            adapters: Folders by name.
            dtype: Of everything.
            device: Where.
        """
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        for name, folder in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        # PEFT loads factors in float32.
        self._model = model.to(device=device, dtype=dtype).eval()
        self._device = device

    @torch.no_grad()
    def log_probabilities(self, tokens: Sequence[int], adapter: str | None) -> Tensor:
        """What each token but the first could have been.

        Args:
            tokens: A prompt with its answer.
            adapter: Whose; None for the base model.

        Returns:
            ``[tokens - 1, vocabulary]`` in fp64 on the CPU.
        """
        ids = torch.tensor([tokens], device=self._device)
        with self._only(adapter):
            logits: Tensor = self._model(ids).logits[0, :-1]
        return logits.double().log_softmax(-1).cpu()

    @contextmanager
    def _only(self, adapter: str | None) -> Iterator[None]:
        if adapter is None:
            with self._model.disable_adapter():
                yield
        else:
            self._model.set_adapter(adapter)
            yield
