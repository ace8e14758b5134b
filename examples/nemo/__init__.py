"""Fine-tuning through NeMo."""
