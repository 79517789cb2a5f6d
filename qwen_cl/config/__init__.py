"""The typed config: the same groups as conf/, and which of its keys affect the result. No torch."""
