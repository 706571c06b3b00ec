"""What the image ops share: checks of uint8 images, one matrix applied along an axis, and tables of
addresses for kernels.

An image is a torch.uint8 tensor (H,W,3). Leaves out everything an op does to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Images = Sequence[Tensor]
Size = tuple[int, int]  # height, width
MOST_SIDE = 2**24 - 1  # sums of a row's levels fit 32 bits
MOST_PIXELS = 2**31 - 1  # with a border of three, so that kernels count pixels in 32 bits


def checked(op: str, images: Images) -> list[Tensor]:
    """The images, contiguous. ValueError: not uint8 (H,W,3), no pixels, too large, or on different
    devices.
    """
    for image in images:
        if (
            image.dtype != torch.uint8
            or image.dim() != 3
            or image.shape[2] != 3
            or image.numel() == 0
        ):
            raise ValueError(
                f"{op}: an image must be uint8 (H,W,3), got {image.dtype} {tuple(image.shape)}"
            )
        if image.device != images[0].device:
            raise ValueError(f"{op}: images on {image.device} and on {images[0].device}")
        check_size(op, size_of(image))
    return [image.contiguous() for image in images]


def check_size(op: str, size: Size) -> None:
    """ValueError: an image of this size has too many pixels for the kernels."""
    height, width = size
    if max(size) > MOST_SIDE or (height + 3) * (width + 3) > MOST_PIXELS:
        raise ValueError(
            f"{op}: an image of {height} x {width} is too large; at most {MOST_SIDE} a side and "
            f"{MOST_PIXELS} pixels"
        )


def on_host(op: str, name: str, values: Tensor) -> Tensor:
    """`values`, refused where reading them would make the host wait for a GPU: geometry belongs on
    the CPU.
    """
    if values.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} must be a CPU tensor; reading it from {values.device} would stall the "
            "host"
        )
    return values


def size_of(image: Tensor) -> Size:
    """(height, width) of an image."""
    height, width = image.shape[:2]
    return height, width


def along_height(matrix: Tensor, image: Tensor) -> Tensor:
    """matrix (K,H) applied to every column of image (H,W,C): (K,W,C)."""
    return (matrix @ image.reshape(image.shape[0], -1)).view(-1, *image.shape[1:])


def along_width(matrix: Tensor, image: Tensor) -> Tensor:
    """matrix (K,W) applied to every row of image (H,W,C): (H,K,C)."""
    return along_height(matrix, image.transpose(0, 1)).transpose(0, 1)


def to_bytes(values: Tensor) -> Tensor:
    """The nearest grey levels, halves up, as uint8."""
    return (values.clamp(0, 255) + 0.5).floor().to(torch.uint8)


def addresses(tensors: Images) -> Tensor:
    """(N,) int64: where each tensor's data begin, for kernels that take images of many sizes in one
    launch.
    """
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def copies(images: Images) -> list[Tensor]:
    """Each image again, side by side in one new allocation, by one copy."""
    flat = torch.cat([image.view(-1) for image in images])
    parts = flat.split([image.numel() for image in images])
    return [part.view_as(image) for part, image in zip(parts, images, strict=True)]


def packed(sizes: Sequence[Size], device: torch.device) -> list[Tensor]:
    """Uninitialised uint8 images (H,W,3) of the given sizes, side by side in one allocation."""
    counts = [3 * height * width for height, width in sizes]
    flat = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    return [part.view(*size, 3) for part, size in zip(flat.split(counts), sizes, strict=True)]
