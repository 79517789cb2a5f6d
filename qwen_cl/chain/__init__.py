"""``task=continual``: stages one after another, and what each did to what was known before. No torch."""
