"""Atomic files and folders, and the home of the cache."""
