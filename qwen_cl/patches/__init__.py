"""Everything that is replaced in NeMo, Megatron, and torch."""
