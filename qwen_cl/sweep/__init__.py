"""Many runs of one command: each its own process on its own part of the machine, and the answer at the end."""
