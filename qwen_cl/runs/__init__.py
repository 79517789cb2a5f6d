"""The folder of a run: its status, metrics, checkpoints, and what resuming it takes."""
