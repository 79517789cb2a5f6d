"""Replace parts of NeMo, Megatron, and torch, as listed in table.yaml."""
