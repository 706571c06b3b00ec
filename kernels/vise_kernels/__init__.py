"""Kernels of vise_fast: each op has one public function and up to three paths (plain PyTorch,
native C++, Triton).

`available()` tells the path each op takes on this machine and why. The package knows nothing of the
trainer.
"""

from vise_kernels.add_layer_norm import add_layer_norm
from vise_kernels.attention import attention
from vise_kernels.decode_attention import decode_attention
from vise_kernels.dispatch import available, prefer
from vise_kernels.few_rows import few_rows
from vise_kernels.ghost import ghost
from vise_kernels.heads import heads, heads_backward
from vise_kernels.linear_logprob import linear_logprob, linear_logprob_kl
from vise_kernels.merge_attention import merge_attention
from vise_kernels.patchify import patchify
from vise_kernels.raised import raised_heads, raised_norm, raised_swiglu
from vise_kernels.recast import Recast
from vise_kernels.resize import resize
from vise_kernels.rms_norm import rms_norm, rms_norm_backward
from vise_kernels.rotate import rotate
from vise_kernels.sample import sample
from vise_kernels.swiglu import swiglu, swiglu_backward
from vise_kernels.token_logprob import token_logprob
from vise_kernels.unpack import unpack_int8, unpack_nf4
from vise_kernels.up_gradient import up_gradient
from vise_kernels.warp import warp

__all__ = [
    "Recast",
    "add_layer_norm",
    "attention",
    "available",
    "decode_attention",
    "few_rows",
    "ghost",
    "heads",
    "heads_backward",
    "linear_logprob",
    "linear_logprob_kl",
    "merge_attention",
    "patchify",
    "prefer",
    "raised_heads",
    "raised_norm",
    "raised_swiglu",
    "resize",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "sample",
    "swiglu",
    "swiglu_backward",
    "token_logprob",
    "unpack_int8",
    "unpack_nf4",
    "up_gradient",
    "warp",
]
