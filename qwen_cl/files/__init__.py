"""Files and folders on disk: whole or not there, and known by their hash."""
