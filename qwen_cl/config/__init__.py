"""Names, types and rules of a run; imports neither torch nor NeMo."""
