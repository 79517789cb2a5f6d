"""Apply speed optimizations that need no Transformer Engine."""
