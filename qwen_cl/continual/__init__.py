"""Stages trained one after another, with learning and forgetting measured."""
