"""The export of adapters and merged models for transformers and PEFT."""
