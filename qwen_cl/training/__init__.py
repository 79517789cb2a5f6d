"""Prepare, build and run one training run."""
