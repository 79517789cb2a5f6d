"""A model's tokenizer, read from whatever form of its files the author wrote."""
