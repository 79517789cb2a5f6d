"""Checkpoints on disk: whole or not there, and what they hold known by sha256. No torch."""
