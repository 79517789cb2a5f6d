"""Large English and Japanese texts from Debian's documentation packages, for the longer experiments."""
