"""What the integrations with NeMo and Megatron-Bridge share; neither is needed to import this."""

from bdlora_megatron.export import export_adapter
from bdlora_megatron.integrations.scheme import PeftChoice, make_peft, read_scheme
from bdlora_megatron.integrations.settings import BlockDiagonalSettings

__all__ = ["BlockDiagonalSettings", "PeftChoice", "export_adapter", "make_peft", "read_scheme"]
