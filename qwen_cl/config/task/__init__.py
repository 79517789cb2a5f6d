"""The settings of each task, one module each."""
