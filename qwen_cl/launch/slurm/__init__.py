"""Run as Slurm jobs."""
