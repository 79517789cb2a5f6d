"""Build the Megatron model, its training step, and its loss."""
