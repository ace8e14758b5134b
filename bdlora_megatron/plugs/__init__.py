"""What the plugs for NeMo and Megatron-Bridge share; neither is needed to import this."""

from bdlora_megatron.plugs.export import export_adapter
from bdlora_megatron.plugs.scheme import PeftChoice, make_peft, read_scheme
from bdlora_megatron.plugs.settings import BlockDiagonalSettings

__all__ = ["BlockDiagonalSettings", "PeftChoice", "export_adapter", "make_peft", "read_scheme"]
