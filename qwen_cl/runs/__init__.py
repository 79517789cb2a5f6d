"""What a run leaves on disk, and what its files say of it."""
