"""The tasks that use a model: evaluate, generate and export."""
