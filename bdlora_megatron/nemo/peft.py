"""BD-LoRA for NeMo 2.x: a ``PEFT`` for ``llm.finetune(peft=...)``."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.pytorch.callbacks.peft import PEFT, WrappedAdapterIO
from nemo.lightning.pytorch.utils import is_trainer_attached
from torch import nn

from bdlora_megatron.errors import UnsupportedError
from bdlora_megatron.export import export_asked_for
from bdlora_megatron.integrations import BlockDiagonalSettings, make_peft

__all__ = ["BDLoRA", "BDLoRAAdapterIO", "build_peft"]


@dataclass
class BDLoRA(BlockDiagonalSettings, PEFT):
    """Block-diagonal LoRA for NeMo, used where its own ``LoRA`` would be.

    Fields are those of ``BlockDiagonalSettings``. NeMo applies it once the base model is loaded and
    saves what has ``.adapter.`` in its name; PEFT's folder ``hf_adapter`` is written beside.
    """

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
        self.put_into(chunks)
        # For the export. Weak: NeMo keeps and copies this object, the model is not to come along.
        self._model = weakref.ref(model)
        if is_trainer_attached(model) and model.trainer.state.fn != TrainerFn.FITTING:
            self.freeze_model(model)
        return model

    def adapted_model(self) -> nn.Module | None:
        """The model that this object was applied to, as long as it lives."""
        reference = getattr(self, "_model", None)
        return None if reference is None else reference()

    def get_wrappped_io(self) -> Any:
        """NeMo's hook (its spelling) for how checkpoints of adapters are read and written."""
        return partial(BDLoRAAdapterIO, peft=self)


class BDLoRAAdapterIO(WrappedAdapterIO):
    """NeMo's checkpoints of adapters, with PEFT's folder beside the weights."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> Any:
        """Save the adapter, and write ``hf_adapter`` into the checkpoint's folder.

        Raises:
            ConfigError: PEFT's folder cannot be written.
            UnsupportedError: A layer has no place in PEFT's format; set ``export_peft=False``.
        """
        request = super().save_checkpoint(checkpoint, path, storage_options)
        model = self.peft.adapted_model()
        if model is not None:
            export_asked_for(self.peft, model, ckpt_to_dir(path))
        return request


def build_peft(config: Any) -> Any:
    """Make the ``peft`` argument of ``llm.finetune`` that a ``peft`` section asks for.

    Args:
        config: The section, or a mapping that holds it as ``peft`` or ``model.peft``.

    Returns:
        A ``BDLoRA``, NeMo's own ``LoRA``, or None for scheme ``none``.

    Raises:
        ConfigError: The scheme, a key or a value is wrong.
    """
    return make_peft(config, BDLoRA, _nemos_lora)


def _nemos_lora(**arguments: Any) -> Any:
    from nemo.collections.llm.peft import LoRA

    return LoRA(**arguments)
