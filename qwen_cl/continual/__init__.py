"""Learning measured beside forgetting."""
