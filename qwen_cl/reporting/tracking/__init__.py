"""The tracking of runs with Weights & Biases."""
