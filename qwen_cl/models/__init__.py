"""Base models: their families, their files, and their conversion to Megatron and back."""
