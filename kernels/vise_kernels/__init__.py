"""Kernels of vise_fast: each op has one public function and up to three paths (plain PyTorch, native C++, Triton).

`available()` tells the path each op takes on this machine and why. The package knows nothing of the trainer.
"""

from vise_kernels.dispatch import available

__all__ = ["available"]
