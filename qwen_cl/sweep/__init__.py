"""Sweeps: their trials, the slots that trials run in, and the results."""
