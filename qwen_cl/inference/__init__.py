"""Asking a model, or what a run made of it: answers, losses, benchmarks."""
