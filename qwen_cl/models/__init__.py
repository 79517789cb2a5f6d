"""Base models: their families, their files, and their way into Megatron and back."""
