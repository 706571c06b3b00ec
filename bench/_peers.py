"""What other libraries offer for the same work, each where it is installed, as contenders {name:
call} of the kernel bench.

A peer may round differently or keep another border; it must do the same amount of useful work on
the same inputs. OpenCV and Pillow work on the CPU whatever the device of the bench: that is the
loop a trainer would otherwise contain.
"""

import functools
import importlib
from collections.abc import Callable

import _measure
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from vise_kernels.unpack import Nibbles

PEERS = {
    "cv2": "cv2",
    "torchvision": "torchvision",
    "kornia": "kornia.filters",
    "trl": "trl.trainer.utils",
    "liger_kernel": "liger_kernel.ops.fused_linear_cross_entropy",
    "cut_cross_entropy": "cut_cross_entropy",
    "bitsandbytes": "bitsandbytes",
}
"""By package, what is taken from it."""
Contenders = dict[str, Callable]


@functools.cache
def installed(peer: str) -> bool:
    """Whether a peer can be imported. One that is there without what it needs itself is told of,
    and left out.
    """
    if not _measure.installed(peer):
        return False
    try:
        importlib.import_module(PEERS[peer])
    except ImportError as fault:
        print(f"{peer} is left out: {fault}")
        return False
    return True


def missing() -> list[str]:
    """The peers that are not installed."""
    return [name for name in PEERS if not installed(name)]


def one_thread() -> None:
    """CPU figures are of one thread, for everybody."""
    torch.set_num_threads(1)
    if installed("cv2"):
        import cv2

        cv2.setNumThreads(1)


def ghost(images: list[Tensor], boxes: Tensor, sigma: float, radius: int) -> Contenders:
    """The blur of one box of each image, by OpenCV, kornia and torchvision."""
    contenders = {}
    if installed("cv2"):
        pictures = [image.cpu().numpy() for image in images]
        contenders |= _opencv_ghost(pictures, boxes.tolist(), sigma, radius)
    return contenders | {
        name: lambda blur=blur: _crop_loop(images, boxes.tolist(), blur, radius)
        for name, blur in _blurs(sigma).items()
    }


def _blurs(sigma: float) -> Contenders:
    """{name: blur of a crop (1,3,h,w) with `side` taps}."""
    blurs: Contenders = {}
    if installed("kornia"):
        from kornia.filters import gaussian_blur2d

        def separable(crop: Tensor, side: int) -> Tensor:
            return gaussian_blur2d(crop, (side, side), (sigma, sigma), "reflect")

        blurs["kornia gaussian_blur2d, separable"] = separable
    if installed("torchvision"):
        from torchvision.transforms.v2.functional import gaussian_blur

        def blur(crop: Tensor, side: int) -> Tensor:
            return gaussian_blur(crop, [side, side], [sigma, sigma])

        blurs["torchvision gaussian_blur"] = blur
    return blurs


def _opencv_ghost(
    pictures: list[np.ndarray], boxes: list[list[int]], sigma: float, radius: int
) -> Contenders:
    import cv2

    side = 2 * radius + 1
    border = cv2.BORDER_REFLECT_101 | cv2.BORDER_ISOLATED
    taps = cv2.getGaussianKernel(side, sigma, cv2.CV_32F)

    def whole(crop: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(crop, (side, side), sigma, borderType=border)

    def separable(crop: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(crop, -1, taps, taps, borderType=border)

    def loop(blur: Callable) -> list[np.ndarray]:
        outs = [picture.copy() for picture in pictures]
        for out, (x1, y1, x2, y2) in zip(outs, boxes, strict=True):
            out[y1:y2, x1:x2] = blur(out[y1:y2, x1:x2])
        return outs

    return {
        "OpenCV GaussianBlur, one-thread loop": lambda: loop(whole),
        "OpenCV sepFilter2D, one-thread loop": lambda: loop(separable),
    }


def _crop_loop(
    images: list[Tensor], boxes: list[list[int]], blur: Callable, radius: int
) -> list[Tensor]:
    """Reflection happens once in these libraries, so the taps are cut to what a box allows: less
    work than ours.
    """
    outs = [image.clone() for image in images]
    for out, (x1, y1, x2, y2) in zip(outs, boxes, strict=True):
        side = 2 * min(radius, x2 - x1 - 1, y2 - y1 - 1) + 1
        crop = blur(out[y1:y2, x1:x2].permute(2, 0, 1)[None].float(), side)[0].permute(1, 2, 0)
        out[y1:y2, x1:x2] = crop.round().to(torch.uint8)
    return outs


def warp(images: list[Tensor], matrices: Tensor) -> Contenders:
    """Images of one size seen through affine matrices (N,3,3), by OpenCV and kornia."""
    contenders = {}
    if installed("cv2"):
        contenders["OpenCV warpAffine, one-thread loop"] = _opencv_warp(images, matrices)
    if installed("kornia"):
        from kornia.geometry.transform import warp_affine

        stacked = torch.stack(images)
        turns = matrices[:, :2].float().to(images[0].device)
        size = tuple(stacked.shape[1:3])

        def whole() -> Tensor:
            return warp_affine(stacked.permute(0, 3, 1, 2).float(), turns, size)

        contenders["kornia warp_affine"] = whole
    return contenders


def _opencv_warp(images: list[Tensor], matrices: Tensor) -> Callable:
    import cv2

    pictures = [image.cpu().numpy() for image in images]
    # OpenCV puts pixel centres on whole numbers
    half = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    turns = [(half @ matrix.numpy() @ np.linalg.inv(half))[:2] for matrix in matrices]
    options = {"flags": cv2.INTER_LINEAR, "borderValue": (128, 128, 128)}
    size = pictures[0].shape[1::-1]

    def loop() -> list[np.ndarray]:
        pairs = zip(pictures, turns, strict=True)
        return [cv2.warpAffine(picture, turn, size, **options) for picture, turn in pairs]

    return loop


def resize(images: list[Tensor], size: tuple[int, int]) -> Contenders:
    """Images to one size (height, width), bicubic and antialiased, by Pillow and PyTorch."""
    pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
    bicubic = {"mode": "bicubic", "antialias": True, "align_corners": False}
    planes = [image.permute(2, 0, 1)[None] for image in images]
    if images[0].device.type == "cuda":  # no uint8 kernel there
        planes = [plane.float() for plane in planes]

    def by_pillow() -> list[np.ndarray]:
        across = size[::-1]
        return [np.asarray(p.resize(across, Image.Resampling.BICUBIC)) for p in pictures]

    def by_torch() -> list[Tensor]:
        return [F.interpolate(plane, size, **bicubic) for plane in planes]

    return {"Pillow BICUBIC loop": by_pillow, "torch interpolate, antialias": by_torch}


def stock_processor(images: list[Tensor], size: tuple[int, int]) -> Contenders:
    """transformers' processor for Qwen3-VL checkpoints: the one on PIL and NumPy, and where
    torchvision is installed the one on torch.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options = {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": size[0] * size[1]},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    processor = Qwen2VLImageProcessorPil(**options)
    pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
    name = "stock processor, Qwen2VLImageProcessorPil"
    contenders: Contenders = {name: lambda: processor(pictures, return_tensors="pt")}
    if installed("torchvision"):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        fast = Qwen2VLImageProcessor(**options)
        planes = [image.permute(2, 0, 1) for image in images]
        contenders |= {"stock processor on torchvision": lambda: fast(planes, return_tensors="pt")}
    return contenders


def unpack(held: Nibbles, shape: tuple[int, int], dtype: torch.dtype) -> Contenders:
    """The same bytes written out by bitsandbytes."""
    if not installed("bitsandbytes") or held.coarse is None:
        return {}
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes, of, offset, block = held.coarse
    wide = QuantState(of, code=codes, blocksize=block, dtype=torch.float32)
    state = QuantState(
        held.scales,
        shape=torch.Size(shape),
        code=held.levels,
        blocksize=held.block,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=wide,
    )
    return {"bitsandbytes dequantize_4bit": lambda: dequantize_4bit(held.bytes, state)}


def token_logprob(ids: Tensor) -> Contenders:
    """Log-prob of `ids` (N,) from logits (N,V), by TRL."""
    if not installed("trl"):
        return {}
    from trl.trainer.utils import selective_log_softmax

    return {"TRL selective_log_softmax": lambda logits: selective_log_softmax(logits, ids)}


def linear_logprob(hidden: Tensor, head: Tensor, ids: Tensor) -> Contenders:
    """Log-prob of `ids` (N,) from hidden rows and the head, by Liger and Cut Cross-Entropy."""
    contenders = {}
    if installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        # a mean over rows: Liger's backward is made in its forward and takes one weight for all
        contenders |= {
            "Liger fused linear cross entropy": lambda: Liger.apply(hidden, head, ids)[0]
        }
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        given = (hidden, head, ids)
        contenders |= {"cut-cross-entropy": lambda: linear_cross_entropy(*given, reduction="none")}
    return contenders


def full_kl(hidden: Tensor, reference: Tensor, head: Tensor) -> Tensor:
    """KL(policy || reference) per row with (N,V) tensors."""
    policy, other = ((rows @ head.T).float().log_softmax(-1) for rows in (hidden, reference))
    return (policy.exp() * (policy - other)).sum(-1)


def copied_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], owner: Tensor) -> Tensor:
    """q (N, H, D) over full banks, each row's keys and values copied next to each other first."""
    k = _copied(keys, owner)
    v = _copied(values, owner)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def _copied(banks: list[Tensor], owner: Tensor) -> Tensor:
    return torch.cat([bank[entry] for bank, entry in zip(banks, owner, strict=True)], 2)


def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (N,) drawn from logits (N,V), and their log-probs."""
    ids = torch.multinomial(logits.softmax(-1), 1)
    return ids[:, 0], logits.log_softmax(-1).gather(1, ids)[:, 0]
