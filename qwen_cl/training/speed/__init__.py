"""Speed optimizations that need no Transformer Engine."""
