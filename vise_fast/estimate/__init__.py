"""What a run will need in memory: `python -m vise_fast.estimate`."""
