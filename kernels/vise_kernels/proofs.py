"""Every Triton op beside its plain version on small ugly inputs, on the user's own card: what
disagrees, does not compile or does not launch is named, and can be switched off.

No test of this project has met every card, driver and compiler. A wrong kernel must cost speed and
a line, never a wrong run. Takes seconds, most of them compiling. Left out: speed, large inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from vise_kernels.add_layer_norm import Affine, add_layer_norm
from vise_kernels.decode_attention import Banks, decode_attention, locate
from vise_kernels.dispatch import choose
from vise_kernels.ghost import ghost
from vise_kernels.heads import Parts, Turn, heads, heads_backward
from vise_kernels.linear_logprob import linear_logprob, linear_logprob_kl
from vise_kernels.merge_attention import merge_attention
from vise_kernels.patchify import patchify
from vise_kernels.raised import FEW, raised_heads, raised_norm, raised_swiglu
from vise_kernels.recast import Recast
from vise_kernels.resize import resize
from vise_kernels.rms_norm import rms_norm, rms_norm_backward
from vise_kernels.rotate import rotate
from vise_kernels.sample import sample
from vise_kernels.swiglu import swiglu, swiglu_backward
from vise_kernels.token_logprob import token_logprob
from vise_kernels.unpack import Coarse, Nibbles, unpack_int8, unpack_nf4
from vise_kernels.up_gradient import up_gradient
from vise_kernels.warp import warp

EPS = 1e-6
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference, of the largest entry: tensor cores may take fp32 as tf32, and the two paths
round at different places."""
GREY_LEVELS = 2
"""Of image ops."""


class Given(NamedTuple):
    """Where and in what an op is tried, by which path."""

    device: torch.device
    dtype: torch.dtype
    path: str

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        """Normal numbers, the same wherever they are drawn."""
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def wide(self, *shape: int, seed: int = 0) -> Tensor:
        """The same in float32."""
        return self._replace(dtype=torch.float32).draw(*shape, seed=seed)

    def pictures(self) -> list[Tensor]:
        """Two of odd sizes."""
        generator = torch.Generator().manual_seed(5)
        sizes = ((28, 56), (84, 28))
        drawn = [torch.randint(0, 256, (*size, 3), generator=generator) for size in sizes]
        return [image.to(torch.uint8).to(self.device) for image in drawn]

    def turn(self, rows: int, dim: int) -> Turn:
        """Weights and angles."""
        angle = self.wide(rows, dim // 2, seed=1)
        weights = (self.draw(dim, seed=2), self.draw(dim, seed=3))
        return Turn(*weights, angle.cos(), angle.sin(), EPS)


def _ghost(g: Given) -> list[Tensor]:
    boxes = torch.tensor([[3, 2, 40, 25], [1, 5, 20, 70]])
    found = []
    for method in ("blur", "pixelate"):
        found += ghost(g.pictures(), [0, 1], boxes, method=method, sigma=4.0, path=g.path)
    return found


def _warp(g: Given) -> list[Tensor]:
    matrix = torch.tensor([[0.9, -0.3, 5.0], [0.3, 0.9, -2.0], [0.0, 0.0, 1.0]])
    return warp(g.pictures(), torch.stack([matrix, matrix.inverse()]).double(), path=g.path)


def _resize(g: Given) -> list[Tensor]:
    return resize(g.pictures(), [(17, 31), (90, 40)], path=g.path)


def _patchify(g: Given) -> list[Tensor]:
    found = []
    for single in (False, True):
        given = g.pictures()
        rows, _ = patchify(given, patch=14, merge=2, dtype=g.dtype, single_tap=single, path=g.path)
        found.append(rows)
    return found


def _with_gradient(leaf: Tensor, results: list[Tensor]) -> list[Tensor]:
    torch.stack([r.float().sum() for r in results]).sum().backward()
    grad = leaf.grad
    return [*(r.detach() for r in results), *([] if grad is None else [grad])]


def _token_logprob(g: Given) -> list[Tensor]:
    logits = (3 * g.draw(5, 1031)).requires_grad_()
    ids = torch.arange(5, device=g.device) * 200
    return _with_gradient(logits, list(token_logprob(logits, ids, path=g.path)))


def _linear_logprob(g: Given) -> list[Tensor]:
    hidden = g.draw(7, 48).requires_grad_()
    head = 0.2 * g.draw(301, 48, seed=1)
    ids = torch.arange(7, device=g.device) * 40
    found = linear_logprob(hidden, head, ids, chunk=128, path=g.path)
    return _with_gradient(hidden, [found])


def _linear_logprob_kl(g: Given) -> list[Tensor]:
    hidden = g.draw(7, 48).requires_grad_()
    reference = hidden.detach() + 0.1 * g.draw(7, 48, seed=2)
    head = 0.2 * g.draw(301, 48, seed=1)
    ids = torch.arange(7, device=g.device) * 40
    banned = torch.arange(301, device=g.device) % 50 == 7
    given = (hidden, reference, head, ids)
    found = linear_logprob_kl(*given, banned=banned, chunk=128, path=g.path)
    return _with_gradient(hidden, list(found))


def _sample(g: Given) -> list[Tensor]:
    logits = 4 * g.wide(6, 1031)
    rows = torch.arange(6, device=g.device)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 0.0, 2.0], device=g.device)
    banned = torch.arange(1031, device=g.device) % 9 == 0
    options = {"temperature": temperature, "banned": banned, "seed": 7919 * rows + 3}
    return list(sample(logits, **options, position=rows, path=g.path))


def _rms_norm(g: Given) -> list[Tensor]:
    x = g.draw(5, 130)
    weight = g.draw(130, seed=1)
    dx = rms_norm_backward(x, weight, g.draw(5, 130, seed=2), EPS, path=g.path)
    return [rms_norm(x, weight, EPS, path=g.path), dx]


def _heads(g: Given) -> list[Tensor]:
    qkv = g.draw(9, 5 * 24)
    turn = g.turn(9, 24)
    grads = Parts(g.draw(9, 3, 24, seed=4), g.draw(9, 1, 24, seed=5), g.draw(9, 1, 24, seed=6))
    return [*heads(qkv, turn, 3, path=g.path), heads_backward(qkv, turn, grads, path=g.path)]


def _swiglu(g: Given) -> list[Tensor]:
    x = 2 * g.draw(7, 260)
    return [swiglu(x, path=g.path), swiglu_backward(x, g.draw(7, 130, seed=1), path=g.path)]


def _decode_attention(g: Given) -> list[Tensor]:
    keys = [g.draw(2, 2, 70, 32), g.draw(5, 2, 9, 32, seed=1)]
    values = [g.draw(2, 2, 70, 32, seed=2), g.draw(5, 2, 9, 32, seed=3)]
    owner = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 2, 3, 4]], device=g.device)
    length = torch.tensor([[70, 3, 0, 65, 1], [9, 1, 4, 0, 2]], device=g.device)
    table = locate(keys, values).to(g.device)
    banks = Banks(keys, values, owner, length, table)
    return [decode_attention(g.draw(5, 6, 32, seed=4), banks, scale=0.2, path=g.path)]


def _merge_attention(g: Given) -> list[Tensor]:
    outs = [g.draw(3, 2, 6, 24, seed=i) for i in range(3)]
    return list(merge_attention(outs, [g.wide(3, 2, 6, seed=i) for i in range(3)], path=g.path))


def _block(g: Given, widths: list[int], rank: int) -> Tensor:
    return torch.block_diag(*(g.draw(width, rank, seed=width) for width in widths))


def _raised_norm(g: Given) -> list[Tensor]:
    found: list[Tensor] = []
    for rows in (19, FEW + 5):  # few rows and many take kernels of their own
        beside = (g.draw(130, 7, seed=2), g.draw(130, seed=3))
        given = (g.draw(rows, 130), g.draw(rows, 137, seed=1), *beside)
        found += raised_norm(*given, EPS, path=g.path)
    return found


def _raised_swiglu(g: Given) -> list[Tensor]:
    return [raised_swiglu(g.draw(19, 274), _block(g, [130, 130], 7), 130, path=g.path)]


def _raised_heads(g: Given) -> list[Tensor]:
    wide = g.draw(19, 5 * 24 + 12)
    return list(raised_heads(wide, _block(g, [72, 24, 24], 4), g.turn(19, 24), 3, path=g.path))


def _up_gradient(g: Given) -> list[Tensor]:
    grad = g.draw(70, 96)
    return up_gradient(
        grad, g.draw(70, 12, seed=1), [50, 30, 16], [0.5, 1.0, 2.0], torch.float32, path=g.path
    )


def _recast(g: Given) -> list[Tensor]:
    sources = [g.wide(3, 5), g.wide(40, 70, seed=1)]
    targets = [torch.zeros(3, 5, dtype=g.dtype, device=g.device)]
    targets.append(torch.zeros(50, 90, dtype=g.dtype, device=g.device)[4:44, 9:79])
    Recast(sources, targets, [1.0, 0.37], path=g.path)()
    return targets


def _add_layer_norm(g: Given) -> list[Tensor]:
    affine = Affine(g.draw(130, seed=2), g.draw(130, seed=3), EPS)
    return list(add_layer_norm(g.draw(5, 130), g.draw(5, 130, seed=1), affine, path=g.path))


def _rotate(g: Given) -> list[Tensor]:
    angle = g.wide(9, 12, seed=1)
    return [rotate(g.draw(9, 11, 24), angle.cos(), angle.sin(), path=g.path)]


def _unpack_nf4(g: Given) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(0, 256, (37 * 35 + 41,), generator=generator)
    data = drawn.to(torch.uint8).to(g.device)
    coarse = Coarse(g.wide(256), g.wide(1, seed=1), g.wide(1, seed=2)[0], 256)
    weight = Nibbles(data[: 37 * 35], g.wide(16), data[-41:], 64, coarse)
    return [unpack_nf4(weight, (37, 70), g.dtype, path=g.path)]


def _unpack_int8(g: Given) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randint(-128, 128, (9, 1100), generator=generator).to(torch.int8).to(g.device)
    return [unpack_int8(weight, g.wide(9).abs(), g.dtype, path=g.path)]


PROOFS: dict[str, Callable[[Given], list[Tensor]]] = {
    "ghost": _ghost,
    "warp": _warp,
    "resize": _resize,
    "patchify": _patchify,
    "token_logprob": _token_logprob,
    "linear_logprob": _linear_logprob,
    "linear_logprob_kl": _linear_logprob_kl,
    "sample": _sample,
    "rms_norm": _rms_norm,
    "heads": _heads,
    "swiglu": _swiglu,
    "decode_attention": _decode_attention,
    "merge_attention": _merge_attention,
    "raised_norm": _raised_norm,
    "raised_swiglu": _raised_swiglu,
    "raised_heads": _raised_heads,
    "up_gradient": _up_gradient,
    "recast": _recast,
    "add_layer_norm": _add_layer_norm,
    "rotate": _rotate,
    "unpack_nf4": _unpack_nf4,
    "unpack_int8": _unpack_int8,
}


def prove(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """{op: what was seen} of the ops whose Triton path is not its plain one here; {} where all
    agree. Ops that cannot take that path at all are not asked.
    """
    seen = {}
    for op, run in PROOFS.items():
        try:
            choose(op, device, "triton")
        except ValueError:
            continue
        fault = _fault(run, device, dtype)
        if fault is not None:
            seen[op] = fault
    return seen


def _fault(
    run: Callable[[Given], list[Tensor]], device: torch.device, dtype: torch.dtype
) -> str | None:
    try:
        found = run(Given(device, dtype, "triton"))
        wanted = run(Given(device, dtype, "plain"))
        return _difference(found, wanted, BOUNDS[dtype])
    except torch.OutOfMemoryError:  # says nothing of the kernel
        raise
    except Exception as fault:  # whatever a compiler, a driver or a launch raises
        line = next(iter(str(fault).splitlines()), "")
        return f"{type(fault).__name__}: {line}"[:120]


def _difference(found: list[Tensor], wanted: list[Tensor], bound: float) -> str | None:
    """What differs by more than `bound` of the largest entry, in words."""
    for result, truth in zip(found, wanted, strict=True):
        if result.shape != truth.shape:
            return f"has shape {tuple(result.shape)}, not {tuple(truth.shape)}"
        if truth.dtype == torch.int64:
            if not torch.equal(result, truth):
                return "gives other ids"
            continue
        far = (result.double() - truth.double()).abs().max().item() if truth.numel() else 0.0
        if truth.dtype == torch.uint8:
            if far > GREY_LEVELS:
                return f"differs by {far:.0f} grey levels"
            continue
        most = max(truth.double().abs().max().item(), 1e-6) if truth.numel() else 1.0
        if not far <= bound * most:
            return f"differs by {far / most:.2g} of the largest"
    return None
