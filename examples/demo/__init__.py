"""What `make demo` runs: a real model and two real adapters, in PEFT and in Megatron-Core."""

import warnings

# Megatron-Core says on import, in every process, that it does without Apex and Transformer Engine.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
# Torch, of names that Megatron-Core 0.16 calls and that are about to change.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
