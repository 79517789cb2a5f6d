"""From a model reference to pinned, checked files, to Megatron's shards; and back to Hugging Face."""
