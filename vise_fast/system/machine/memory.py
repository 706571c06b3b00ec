"""Whether an exception says that memory ran out, however the library that met it puts it."""

from __future__ import annotations

import torch

CPU_ALLOCATOR = "DefaultCPUAllocator"
WORDS = (
    CPU_ALLOCATOR,
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUDA driver error: out of memory",
)
"""Of torch's allocators, cuBLAS, cuDNN, the CUDA runtime and driver, Triton."""


def exhausted(fault: BaseException) -> bool:
    """On a GPU, on a CPU, in Python."""
    if isinstance(fault, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(fault)
    return any(words in text for words in WORDS)
