"""LoRA checkpoints of Megatron-Bridge and NeMo."""
