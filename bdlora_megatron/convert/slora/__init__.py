"""S-LoRA's shards, one for each rank."""
