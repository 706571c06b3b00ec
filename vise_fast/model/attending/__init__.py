"""How tokens attend: the banks of a tree, FlashAttention where it is, what to fall back to."""
