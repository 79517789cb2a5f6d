"""Tokenizer files of any transformers version, normalized to one form. No torch."""
