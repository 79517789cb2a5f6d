"""Tasks on a finished run: evaluate, generate, export."""
