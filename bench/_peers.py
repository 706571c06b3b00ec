"""What other libraries offer for the same work, each where it is installed, as contenders {name:
call} of the kernel bench.

A peer may round differently or keep another border; it must do the same amount of useful work on
the same inputs. OpenCV and Pillow work on the CPU whatever the device of the bench: that is the
loop a trainer would otherwise contain.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _measure import installed
from PIL import Image
from torch import Tensor

PEERS = ("cv2", "torchvision", "kornia", "trl", "liger_kernel", "cut_cross_entropy")
Contenders = dict[str, Callable]


def missing() -> list[str]:
    return [name for name in PEERS if not installed(name)]


def one_thread() -> None:
    """CPU figures are of one thread, for everybody."""
    torch.set_num_threads(1)
    if installed("cv2"):
        import cv2

        cv2.setNumThreads(1)


def ghost(images: list[Tensor], boxes: Tensor, sigma: float, radius: int) -> Contenders:
    contenders = {}
    if installed("cv2"):
        contenders |= _opencv_ghost(
            [image.cpu().numpy() for image in images], boxes.tolist(), sigma, radius
        )
    blurs = {}
    if installed("kornia"):
        from kornia.filters import gaussian_blur2d

        blurs["kornia gaussian_blur2d, separable"] = lambda crop, side: gaussian_blur2d(
            crop, (side, side), (sigma, sigma), "reflect"
        )
    if installed("torchvision"):
        from torchvision.transforms.v2.functional import gaussian_blur

        blurs["torchvision gaussian_blur"] = lambda crop, side: gaussian_blur(
            crop, [side, side], [sigma, sigma]
        )
    return contenders | {
        name: lambda blur=blur: _crop_loop(images, boxes.tolist(), blur, radius)
        for name, blur in blurs.items()
    }


def _opencv_ghost(
    pictures: list[np.ndarray], boxes: list[list[int]], sigma: float, radius: int
) -> Contenders:
    import cv2

    side = 2 * radius + 1
    border = cv2.BORDER_REFLECT_101 | cv2.BORDER_ISOLATED
    taps = cv2.getGaussianKernel(side, sigma, cv2.CV_32F)

    def loop(blur: Callable) -> list[np.ndarray]:
        outs = [picture.copy() for picture in pictures]
        for out, (x1, y1, x2, y2) in zip(outs, boxes, strict=True):
            out[y1:y2, x1:x2] = blur(out[y1:y2, x1:x2])
        return outs

    return {
        "OpenCV GaussianBlur, one-thread loop": lambda: loop(
            lambda crop: cv2.GaussianBlur(crop, (side, side), sigma, borderType=border)
        ),
        "OpenCV sepFilter2D, one-thread loop": lambda: loop(
            lambda crop: cv2.sepFilter2D(crop, -1, taps, taps, borderType=border)
        ),
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
    contenders = {}
    if installed("cv2"):
        import cv2

        pictures = [image.cpu().numpy() for image in images]
        half = np.array(
            [[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]]
        )  # OpenCV puts pixel centres on whole numbers
        turns = [(half @ matrix.numpy() @ np.linalg.inv(half))[:2] for matrix in matrices]
        size = pictures[0].shape[1::-1]
        contenders["OpenCV warpAffine, one-thread loop"] = lambda: [
            cv2.warpAffine(picture, turn, size, flags=cv2.INTER_LINEAR, borderValue=(128, 128, 128))
            for picture, turn in zip(pictures, turns)
        ]
    if installed("kornia"):
        from kornia.geometry.transform import warp_affine

        stacked = torch.stack(images)
        turns32 = matrices[:, :2].float().to(images[0].device)
        size = tuple(stacked.shape[1:3])
        contenders["kornia warp_affine"] = lambda: warp_affine(
            stacked.permute(0, 3, 1, 2).float(), turns32, size
        )
    return contenders


def resize(images: list[Tensor], size: tuple[int, int]) -> Contenders:
    pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
    bicubic = {"mode": "bicubic", "antialias": True, "align_corners": False}
    planes = [image.permute(2, 0, 1)[None] for image in images]
    if images[0].device.type == "cuda":  # no uint8 kernel there
        planes = [plane.float() for plane in planes]
    return {
        "Pillow BICUBIC loop": lambda: [
            np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)) for picture in pictures
        ],
        "torch interpolate, antialias": lambda: [
            F.interpolate(plane, size, **bicubic) for plane in planes
        ],
    }


def stock_processor(images: list[Tensor], size: tuple[int, int]) -> Contenders:
    """transformers' processor for Qwen3-VL checkpoints: the one on PIL and NumPy, and where
    torchvision is installed the one on torch.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = size[0] * size[1]
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    options = {
        "patch_size": 16,
        "merge_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": area},
        **normal,
    }
    processor = Qwen2VLImageProcessorPil(**options)
    pictures = [Image.fromarray(image.cpu().numpy()) for image in images]
    contenders = {
        "stock processor, Qwen2VLImageProcessorPil": lambda: processor(
            pictures, return_tensors="pt"
        )
    }
    if installed("torchvision"):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        fast = Qwen2VLImageProcessor(**options)
        planes = [image.permute(2, 0, 1) for image in images]
        contenders["stock processor on torchvision"] = lambda: fast(planes, return_tensors="pt")
    return contenders


def token_logprob(ids: Tensor) -> Contenders:
    if not installed("trl"):
        return {}
    from trl.trainer.utils import selective_log_softmax

    return {"TRL selective_log_softmax": lambda logits: selective_log_softmax(logits, ids)}


def linear_logprob(hidden: Tensor, head: Tensor, ids: Tensor) -> Contenders:
    contenders = {}
    if installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        # a mean over rows: Liger's backward is made in its forward and takes one weight for all
        contenders["Liger fused linear cross entropy"] = lambda: Liger.apply(hidden, head, ids)[0]
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        contenders["cut-cross-entropy"] = lambda: linear_cross_entropy(
            hidden, head, ids, reduction="none"
        )
    return contenders


def full_kl(hidden: Tensor, reference: Tensor, head: Tensor) -> Tensor:
    """KL(policy || reference) per row with (N,V) tensors."""
    policy, other = ((rows @ head.T).float().log_softmax(-1) for rows in (hidden, reference))
    return (policy.exp() * (policy - other)).sum(-1)


def copied_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], owner: Tensor) -> Tensor:
    """q (N, H, D) over full banks, each row's keys and values copied next to each other first."""
    k, v = (
        torch.cat([bank[entry] for bank, entry in zip(banks, owner, strict=True)], 2)
        for banks in (keys, values)
    )
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[
        :, :, 0
    ]


def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.multinomial(logits.softmax(-1), 1)
    return ids[:, 0], logits.log_softmax(-1).gather(1, ids)[:, 0]
