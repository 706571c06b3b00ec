"""uint8 images to rows of normalised patches, in the order Qwen3-VL's vision tower reads them.

    value = (level / 255 - mean) / std;  row order: images, then squares of merge x merge patches row by row, then the patches of
    a square row by row;  within a row: channel, temporal tap, y, x. The taps of a still are the same picture `temporal` times.

single_tap leaves out the repeats, half the bytes, for a patch embedding whose temporal taps were added up. Leaves out resizing.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vise_kernels.dispatch import choose, jit, native, tl, triton
from vise_kernels.pixels import Images, addresses, checked


def patchify(
    images: Images,
    *,
    patch: int,
    merge: int,
    temporal: int = 2,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    dtype: torch.dtype = torch.float32,
    single_tap: bool = False,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(patches (sum of tokens, 3 * temporal * patch^2) of dtype, grid_thw (N,3) int64 on the CPU) of uint8 (H,W,3) images.

    H and W are multiples of patch * merge. With single_tap a row has 3 * patch^2 values. path forces "plain", "native" or
    "triton". ValueError: no image, sizes off the grid, a dtype that is not float16, bfloat16 or float32, a path that cannot run.
    """
    images = checked("patchify", images)
    if not images or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"patchify: needs an image and a float dtype of at most 32 bits, got {len(images)} and {dtype}")
    side = patch * merge
    for image in images:
        if image.shape[0] % side or image.shape[1] % side:
            raise ValueError(f"patchify: {tuple(image.shape[:2])} is not a multiple of {side} (patch {patch} x merge {merge})")
    taps = 1 if single_tap else temporal
    grid = torch.tensor([[1, image.shape[0] // patch, image.shape[1] // patch] for image in images])
    path = choose("patchify", images[0].device, path).path
    run = {"plain": plain, "native": _native, "triton": _triton}[path]
    return run(images, patch, merge, taps, tuple(mean), tuple(std), dtype), grid


def normalise(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(..., 3) grey levels to float32, rounded where transformers' image processors round: after the float64 product too."""
    scaled = (levels.double() * (1 / 255)).float()
    return (scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)


def plain(images: Images, patch: int, merge: int, taps: int, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    """A view of each image in nine axes, permuted."""
    return torch.cat([_patchify_one(normalise(image, mean, std).to(dtype), patch, merge, taps) for image in images])


def _patchify_one(values: Tensor, patch: int, merge: int, taps: int) -> Tensor:
    rows, columns = (size // (patch * merge) for size in values.shape[:2])
    squares = values.view(rows, merge, patch, columns, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5)
    return squares.unsqueeze(5).expand(-1, -1, -1, -1, -1, taps, -1, -1).reshape(-1, 3 * taps * patch * patch)


@functools.lru_cache(maxsize=16)
def _levels(mean: tuple, std: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3,256): the value of every grey level of every channel, so that the fast paths look up instead of computing."""
    return normalise(torch.arange(256)[:, None].expand(-1, 3), mean, std).to(dtype).T.contiguous().to(device, non_blocking=True)


def _native(images: Images, patch: int, merge: int, taps: int, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    out = _allocate(images, patch, taps, dtype)
    native().patchify(images, out, _levels(mean, std, dtype, out.device), patch, merge, taps, torch.get_num_threads())
    return out


def _allocate(images: Images, patch: int, taps: int, dtype: torch.dtype) -> Tensor:
    tokens = sum(image.shape[0] * image.shape[1] for image in images) // patch**2
    return torch.empty(tokens, 3 * taps * patch * patch, dtype=dtype, device=images[0].device)


COLUMNS = 4  # of the table: address of the image, first row of the output, width in patches, patches
VALUES = 1024  # per program


@jit
def _patchify_kernel(table, levels, out, COLUMNS: tl.constexpr, VALUES: tl.constexpr, PATCH: tl.constexpr, MERGE: tl.constexpr, TAPS: tl.constexpr):
    row = table + tl.program_id(1).to(tl.int64) * COLUMNS
    source = tl.load(row).to(tl.pointer_type(tl.uint8))
    begin, columns, patches = tl.load(row + 1), tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    plane: tl.constexpr = PATCH * PATCH
    p = tl.program_id(0) * VALUES + tl.arange(0, VALUES)  # counts patches, channels, y, x
    inside = p < patches * 3 * plane
    token, channel, y, x = p // (3 * plane), p // plane % 3, p // PATCH % PATCH, p % PATCH
    square, member = token // (MERGE * MERGE), token % (MERGE * MERGE)
    squares = columns // MERGE
    line = (square // squares * MERGE + member // MERGE) * PATCH + y
    column = (square % squares * MERGE + member % MERGE) * PATCH + x
    level = tl.load(source + (line.to(tl.int64) * columns * PATCH + column) * 3 + channel, mask=inside, other=0)
    value = tl.load(levels + channel * 256 + level, mask=inside)
    to = out + ((begin + token) * 3 + channel) * TAPS * plane + y * PATCH + x
    for tap in tl.static_range(TAPS):
        tl.store(to + tap * plane, value, mask=inside)


def _triton(images: Images, patch: int, merge: int, taps: int, mean: tuple, std: tuple, dtype: torch.dtype) -> Tensor:
    out = _allocate(images, patch, taps, dtype)
    device = out.device
    width = torch.tensor([image.shape[1] // patch for image in images])
    patches = torch.tensor([image.shape[0] * image.shape[1] // patch**2 for image in images])
    table = torch.stack([addresses(images), patches.cumsum(0) - patches, width, patches], 1).to(device, non_blocking=True)
    grid = (triton.cdiv(int(patches.max()) * 3 * patch**2, VALUES), len(images))
    _patchify_kernel[grid](table, _levels(mean, std, dtype, device), out, COLUMNS, VALUES, patch, merge, taps)
    return out
