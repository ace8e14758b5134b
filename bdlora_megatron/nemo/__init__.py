"""BD-LoRA in NeMo. Importing this registers it, under the name ``bdlora``.

With NeMo 2.x, in ``nemo.collections.llm.peft.PEFT_STR2CLS``; where NeMo 1.x's map is still there
(nemo-toolkit up to 2.5), for ``model.peft.peft_scheme: bdlora`` as well.
"""

from bdlora_megatron.nemo.register import register

registered = register()

from bdlora_megatron.nemo.peft import BDLoRA, build_peft  # noqa: E402

__all__ = ["BDLoRA", "build_peft", "register", "registered"]
