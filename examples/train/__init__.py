"""Fine-tuning SmolLM2-135M from YAML, on real text."""
