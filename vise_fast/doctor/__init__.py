"""Is this machine ready? `python -m vise_fast.doctor`."""
