"""Sweeps: trials, the slots they run in, and their results."""
