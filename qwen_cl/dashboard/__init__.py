"""Weights & Biases beside a run: who the run is there, what is logged, and what happens when W&B fails."""
