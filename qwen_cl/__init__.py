"""Adapt an open LLM to a new language with NVIDIA NeMo 2.0, straight from Hugging Face."""
