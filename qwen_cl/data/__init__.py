"""Data: files, rows, examples, and the data module that training reads."""
