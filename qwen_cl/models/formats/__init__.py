"""File formats of weights: safetensors, and NeMo 2.0 checkpoints."""
