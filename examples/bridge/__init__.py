"""Fine-tuning through Megatron-Bridge."""
