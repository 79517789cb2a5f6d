"""From files to rows to the data module."""
