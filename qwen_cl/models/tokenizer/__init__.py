"""The normalization of tokenizer files from any transformers version. No torch."""
