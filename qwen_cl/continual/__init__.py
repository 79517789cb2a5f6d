"""Continual learning: stages trained one after another, with learning and forgetting evaluated."""
