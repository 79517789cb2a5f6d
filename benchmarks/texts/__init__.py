"""Large English and Japanese texts from Debian's documentation packages, for longer experiments."""
