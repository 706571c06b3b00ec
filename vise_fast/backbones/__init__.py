"""Model families the fast engine knows, one file each; `linear.py` is the frozen-weight-plus-LoRA product they share."""
