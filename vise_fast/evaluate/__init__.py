"""Held-out figures of a model with and without its adapter: `python -m vise_fast.evaluate`."""
