"""Telling NeMo that there is a scheme called ``bdlora``."""

from __future__ import annotations

from bdlora_megatron.errors import MissingDependencyError

__all__ = ["register"]


def register() -> None:
    """Put ``bdlora`` into NeMo's map of PEFT schemes, ``PEFT_STR2CLS``; harmless twice.

    Raises:
        MissingDependencyError: There is no NeMo, or one without an LLM collection.
    """
    try:
        from nemo.collections.llm.peft import PEFT_STR2CLS

        from bdlora_megatron.nemo.peft import BDLoRA
    except ImportError as error:
        raise MissingDependencyError(
            f"bdlora_megatron.nemo needs NeMo's LLM collection and what it imports ({error}); "
            "pip install 'bdlora-megatron[nemo]'. NeMo 3 has no LLM collection any more: use "
            "Megatron-Bridge there"
        ) from error
    PEFT_STR2CLS.update({"bdlora": BDLoRA, "BDLoRA": BDLoRA})
