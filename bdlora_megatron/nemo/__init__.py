"""BD-LoRA in NeMo 2.x. Importing this registers it, under the name ``bdlora``."""

from bdlora_megatron.nemo.register import register

register()

from bdlora_megatron.nemo.peft import BDLoRA, build_peft  # noqa: E402

__all__ = ["BDLoRA", "build_peft", "register"]
