"""Telling NeMo that there is a scheme called ``bdlora``."""

from __future__ import annotations

import importlib

from bdlora_megatron.errors import MissingDependencyError

__all__ = ["register"]

LLM_PEFT = "nemo.collections.llm.peft"
LEGACY_PEFT = "nemo.collections.nlp.parts.peft_config"


def register() -> tuple[str, ...]:
    """Put ``bdlora`` into every map of PEFT schemes that the installed NeMo has; harmless twice.

    Returns:
        The modules whose map was added to.

    Raises:
        MissingDependencyError: There is no NeMo, or one without an LLM collection.
    """
    try:
        llm_peft = importlib.import_module(LLM_PEFT)
        from bdlora_megatron.nemo.peft import BDLoRA
    except ImportError as error:
        raise MissingDependencyError(
            f"bdlora_megatron.nemo needs NeMo's LLM collection and what it imports ({error}); "
            "pip install 'bdlora-megatron[nemo]'. NeMo 3 has no LLM collection any more: use "
            "Megatron-Bridge there"
        ) from error
    llm_peft.PEFT_STR2CLS.update({"bdlora": BDLoRA, "BDLoRA": BDLoRA})
    try:
        legacy = importlib.import_module(LEGACY_PEFT)
    except ImportError:
        return (LLM_PEFT,)
    from bdlora_megatron.nemo.legacy import BDLoRAPEFTConfig

    legacy.PEFT_CONFIG_MAP["bdlora"] = BDLoRAPEFTConfig
    return (LLM_PEFT, LEGACY_PEFT)
