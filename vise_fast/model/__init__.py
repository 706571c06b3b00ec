"""One copy of the weights: loading, LoRA, our forward over transformers' tensors, export."""
