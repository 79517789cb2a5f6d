"""Base weights read by slices into Megatron's shards."""
