"""A local page to try a model on one's own picture: `python -m vise_fast.demo`."""
