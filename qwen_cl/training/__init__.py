"""One training run: its preparation, its recipe, and its worker."""
