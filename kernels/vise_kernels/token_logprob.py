"""Log-probability of chosen ids from ready logits, with the log-sum-exp and the entropy of each row.

    logsumexp = log sum_v exp(z_v)        logprob = z_id - logsumexp        entropy = logsumexp - sum_v p_v z_v

Logits of minus infinity (banned ids) have probability zero and add nothing to the entropy. Leaves out the product with
the LM head (`linear_logprob.py`).
"""

import torch
from torch import Tensor

from vise_kernels.dispatch import choose


def token_logprob(logits: Tensor, ids: Tensor, *, path: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of `ids` (N,) int64 under softmax(`logits` (N,V), any float dtype): (logprob, logsumexp, entropy) in nat.

    Each is (N,) float32 (float64 for float64 logits), accumulated in that dtype; all three are differentiable in the
    logits. `path` forces "plain", "native" or "triton". ValueError: shapes that do not fit, or a path that cannot run.
    """
    _check(logits, ids)
    choose("token_logprob", logits.device, path)
    return plain(logits, ids)


def plain(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in PyTorch: a few (N,V) temporaries, any number of derivatives."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logsumexp = torch.logsumexp(z, -1)
    logprob = z.gather(1, ids[:, None])[:, 0] - logsumexp
    share = (z - logsumexp[:, None]).exp()
    entropy = logsumexp - (share * z.masked_fill(z == -torch.inf, 0)).sum(-1)
    return logprob, logsumexp, entropy


def _check(logits: Tensor, ids: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"token_logprob: logits must be a float tensor (N,V), got {logits.dtype} {tuple(logits.shape)}")
    if ids.shape != logits.shape[:1] or ids.dtype != torch.int64:
        raise ValueError(f"token_logprob: ids must be int64 ({len(logits)},), got {ids.dtype} {tuple(ids.shape)}")
    if ids.device != logits.device:
        raise ValueError(f"token_logprob: ids are on {ids.device}, logits on {logits.device}")
