"""Atomic files and folders, hashing, and the location of the cache."""
