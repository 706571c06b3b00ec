"""One copy of the weights: loading, LoRA, the fast forward pass over transformers' tensors, export."""
