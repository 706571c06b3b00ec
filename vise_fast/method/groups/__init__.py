"""Which groups of samples count, and how much."""
