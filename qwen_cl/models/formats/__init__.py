"""The file formats of weights: safetensors, and NeMo 2.0 checkpoints."""
