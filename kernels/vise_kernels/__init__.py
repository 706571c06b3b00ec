"""Kernels of vise_fast: each op has one public function and up to three paths (plain PyTorch, native C++, Triton).

`available()` tells the path each op takes on this machine and why. The package knows nothing of the trainer.
"""

from vise_kernels.dispatch import available
from vise_kernels.linear_logprob import linear_logprob, linear_logprob_kl
from vise_kernels.sample import sample
from vise_kernels.token_logprob import token_logprob

__all__ = ["available", "linear_logprob", "linear_logprob_kl", "sample", "token_logprob"]
