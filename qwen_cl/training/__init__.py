"""Training a run: its recipe, the processes that train it, and what they change of NeMo's training."""
