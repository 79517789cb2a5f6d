"""What is changed in NeMo, Megatron, Lightning and torch."""
