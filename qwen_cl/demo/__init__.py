"""The embedded model and data: a first run that needs no network and no GPU."""
