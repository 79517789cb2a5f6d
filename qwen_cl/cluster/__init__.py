"""Runs on machines other than this one: described, submitted, followed, and found again by their folder."""
