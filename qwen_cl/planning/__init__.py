"""Checks and decisions before a run: data, devices, parallelism, memory, and speed."""
