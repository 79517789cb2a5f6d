"""Adapters and merged models written for transformers and PEFT."""
