"""What the plugs for NeMo and Megatron-Bridge share; neither is needed to import this."""

from bdlora_megatron.plugs.scheme import PeftChoice, read_scheme
from bdlora_megatron.plugs.settings import BlockDiagonalSettings

__all__ = ["BlockDiagonalSettings", "PeftChoice", "read_scheme"]
