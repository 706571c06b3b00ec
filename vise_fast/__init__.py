"""vise_fast: Visual Invariance Self-Evolution of vision-language models on one GPU."""

__version__ = "0.1.0"
