"""The demo: a real base model, two real adapters, and what PEFT says they answer."""
