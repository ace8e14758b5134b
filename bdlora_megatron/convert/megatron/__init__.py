"""Sharded checkpoints of Megatron-Core, as this package's own layers save them."""
