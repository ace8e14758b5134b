"""BD-LoRA for NeMo 2.x: a ``PEFT`` for ``llm.finetune(peft=...)``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.callbacks.peft import PEFT, WrappedAdapterIO
from nemo.lightning.pytorch.utils import is_trainer_attached
from nemo.utils.get_rank import is_global_rank_zero
from torch import nn

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.layers import apply_lora
from bdlora_megatron.plugs import BlockDiagonalSettings, read_scheme
from bdlora_megatron.plugs.hf import hf_adapter_config

__all__ = ["BDLoRA", "BDLoRAAdapterIO", "build_peft"]


@dataclass
class BDLoRA(BlockDiagonalSettings, PEFT):
    """Block-diagonal LoRA for NeMo, used where its own ``LoRA`` would be.

    Fields are those of ``BlockDiagonalSettings``. NeMo applies it once the base model is loaded and
    saves what has ``.adapter.`` in its name; PEFT's ``adapter_config.json`` is written beside.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hf_config: dict[str, Any] | None = None

    def transform(
        self, module: nn.Module, name: str | None = None, prefix: str | None = None
    ) -> Any:
        """Refused: layers are chosen over the whole model, so that misspelt targets are noticed.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"BDLoRA cannot transform {name!r} by itself; call the object on the whole model"
        )

    def __call__(self, model: Any) -> Any:
        """Freeze the model and put fresh adapters in.

        Args:
            model: NeMo's model, or its ``MegatronParallel`` with one or several chunks.

        Returns:
            ``model``.

        Raises:
            ConfigError: Settings are wrong, or the model is wrapped or has adapters already.
            TargetError: A target pattern matches no layer on any pipeline stage.
            UnsupportedError: A matched layer cannot carry an adapter.
        """
        self.freeze_model(model)
        chunks = list(model) if isinstance(model, nn.ModuleList) else [model]
        lora = self.lora_config(chunks)
        adapted = apply_lora(chunks, lora)
        self.hf_config = hf_adapter_config(lora, adapted, num_layers=_num_layers(chunks[0]))
        if is_trainer_attached(model) and model.trainer.state.fn != TrainerFn.FITTING:
            self.freeze_model(model)
        return model

    def get_wrappped_io(self) -> Any:
        """NeMo's hook (its spelling) for how checkpoints of adapters are read and written."""
        return partial(BDLoRAAdapterIO, peft=self)


class BDLoRAAdapterIO(WrappedAdapterIO):
    """NeMo's checkpoints of adapters, with PEFT's configuration beside the weights."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> Any:
        """Save the adapter, and write ``adapter_config.json`` into the checkpoint's folder."""
        request = super().save_checkpoint(checkpoint, path, storage_options)
        if is_global_rank_zero() and self.peft.hf_config is not None:
            weights = Path(ckpt_to_weights_subdir(path, is_saving=True))
            weights.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.peft.hf_config, indent=2)
            (weights.parent / "adapter_config.json").write_text(text + "\n")
        return request


def _num_layers(model: nn.Module) -> int:
    for module in model.modules():
        layers = getattr(getattr(module, "config", None), "num_layers", None)
        if isinstance(layers, int):
            return layers
    raise UnsupportedError("the model has no TransformerConfig that tells its number of layers")


def build_peft(config: Any) -> Any:
    """Make the ``peft`` argument of ``llm.finetune`` that a ``peft`` section asks for.

    Args:
        config: The section, or a mapping that holds it as ``peft`` or ``model.peft``.

    Returns:
        A ``BDLoRA``, NeMo's own ``LoRA``, or None for scheme ``none``.

    Raises:
        ConfigError: The scheme, a key or a value is wrong.
    """
    choice = read_scheme(config)
    if choice.scheme == "none":
        return None
    if choice.scheme == "lora":
        from nemo.collections.llm.peft import LoRA

        return LoRA(**choice.arguments)
    return BDLoRA(**choice.arguments)
