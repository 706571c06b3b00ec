"""Every op of vise_kernels beside its plain version, beside the peers that are installed, and
beside the machine's ceilings.

    python bench/kernels.py                     on the GPU if there is one (Triton), else on one CPU
                                                thread (native C++)
    python bench/kernels.py --op ghost --write  one op; --write puts the document under
                                                bench/results/
    python bench/kernels.py --smoke             tiny shapes, one repeat: does everything run?

Contenders of a case do the same work on the same inputs; `ours` is the path that the op takes by
itself. "ceiling" is the time the case's bytes or FLOPs would take at the copy bandwidth or matmul
rate measured in the same run, as a share of our time (above 100 %: the data fit a cache, which the
copy does not). Figures from a CPU are ratios: its seconds are in the JSON only. Left out:
correctness (tests/kernels/).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import _checkout
import _measure as measure
import _peers as peers
import torch
import vise_kernels
from torch import Tensor
from vise_kernels import (
    Recast,
    add_layer_norm,
    attention,
    decode_attention,
    few_rows,
    ghost,
    heads,
    heads_backward,
    linear_logprob,
    linear_logprob_kl,
    merge_attention,
    patchify,
    raised_heads,
    raised_norm,
    raised_swiglu,
    resize,
    rms_norm,
    rms_norm_backward,
    rotate,
    sample,
    swiglu,
    swiglu_backward,
    token_logprob,
    unpack_int8,
    unpack_nf4,
    up_gradient,
    warp,
)
from vise_kernels.add_layer_norm import Affine
from vise_kernels.attention import Bank
from vise_kernels.decode_attention import Banks, locate
from vise_kernels.dispatch import native
from vise_kernels.heads import Turn
from vise_kernels.unpack import Coarse, Nibbles


@dataclass
class Case:
    """One comparison. `moved` and `flop` are the least that the work needs; `memory`: report the
    extra memory too.
    """

    op: str
    shape: str
    contenders: dict[str, Callable]
    moved: int = 0
    flop: int = 0
    memory: bool = False


def beside_plain(run: Callable) -> dict[str, Callable]:
    """`run(path=None)` as the op goes by itself, and plain."""
    return {"ours": run, "plain": lambda: run(path="plain")}


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def name_of(dtype: torch.dtype) -> str:
    """As a shape tells it."""
    return str(dtype)[6:]


# ---- images --------------------------------------------------------------------------------------


def noise(count: int, height: int, width: int, device: torch.device) -> list[Tensor]:
    """`count` images (height, width, 3) of random bytes."""
    generator = torch.Generator().manual_seed(0)
    size = (height, width, 3)
    pictures = [
        torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for _ in range(count)
    ]
    return [picture.to(device) for picture in pictures]


def random_boxes(count: int, height: int, width: int) -> Tensor:
    """Sides uniform over 0.1..0.7 of the image's, places uniform."""
    generator = torch.Generator().manual_seed(1)
    share, place = torch.rand(2, count, 2, generator=generator)
    sides = (0.1 + 0.6 * share) * torch.tensor([width, height])
    corner = place * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], 1).round().long()


def image_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """One ghost of each image by every method, and a rotation."""
    count = 2 if smoke else 64 if device.type == "cuda" else 16
    height, width = (96, 128) if smoke else (480, 640)
    images = noise(count, height, width, device)
    boxes = random_boxes(count, height, width)
    moved = 2 * size_of(*images)
    shape = f"{count} x {height}x{width}"
    for radius in (75, 25):
        told = f"{shape}, blur, {2 * radius + 1} taps, random boxes"
        contenders = ghosts(images, boxes, sigma=25.0, radius=radius)
        contenders |= peers.ghost(images, boxes, 25.0, radius)
        yield Case("ghost", told, contenders, moved=moved)
    for method in ("mean", "pixelate"):
        contenders = ghosts(images, boxes, method=method)
        yield Case("ghost", f"{shape}, {method}, random boxes", contenders, moved=moved)
    matrices = turned(count)
    contenders = beside_plain(partial(warp, images, matrices)) | peers.warp(images, matrices)
    yield Case("warp", f"{shape}, rotation by 10 degrees", contenders, moved=moved)


def ghosts(images: list[Tensor], boxes: Tensor, **options) -> dict[str, Callable]:
    """Ours and plain, box n of image n."""
    return beside_plain(partial(ghost, images, torch.arange(len(images)), boxes, **options))


def turned(count: int) -> Tensor:
    """(count,3,3): a rotation by 10 degrees, with a shift that keeps most of a 640x480 image in
    sight.
    """
    turn = torch.tensor(
        [[0.98, -0.17, 60.0], [0.17, 0.98, -40.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    return turn.expand(count, 3, 3).contiguous()


def patch_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Images to the model's grid, to patches, through a warp to patches, and all the way."""
    count = 1 if smoke else 32 if device.type == "cuda" else 4
    old, new = ((96, 128), (64, 96)) if smoke else ((768, 1024), (480, 640))
    images = noise(count, *old, device)
    small = noise(count, *new, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cut = partial(patchify, patch=16, merge=2, dtype=dtype)
    read = size_of(*images)
    kept = size_of(*small)
    way = f"{count} x {old[0]}x{old[1]} to {new[0]}x{new[1]}"
    sized = partial(resize, images, [new] * count)
    contenders = beside_plain(sized) | peers.resize(images, new)
    yield Case("resize", way, contenders, moved=read + kept)
    for single, taps in ((False, "two taps"), (True, "one tap")):
        contenders = beside_plain(partial(cut, small, single_tap=single))
        moved = kept * (1 + dtype.itemsize * (1 if single else 2))
        yield Case("patchify", f"{count} x {new[0]}x{new[1]}, {taps}", contenders, moved=moved)
    yield warped_case(small, partial(cut, single_tap=True), kept * (1 + dtype.itemsize))

    def both(path: str | None = None) -> tuple[Tensor, Tensor]:
        return cut(sized(path=path), path=path)

    contenders = beside_plain(both) | peers.stock_processor(images, new)
    moved = read + 2 * kept + 2 * dtype.itemsize * kept
    yield Case("resize + patchify", way, contenders, moved=moved)


def warped_case(images: list[Tensor], cut: Callable, moved: int) -> Case:
    """Ours reads patches through the matrices; the others write the warped images first."""
    height, width = images[0].shape[:2]
    matrices = turned(len(images))
    contenders = beside_plain(partial(cut, images, matrices_px=matrices))
    contenders |= {"warp, then patchify": lambda: cut(warp(images, matrices))}
    shape = f"{len(images)} x {height}x{width}, rotation by 10 degrees, one tap"
    return Case("warp + patchify", shape, contenders, moved=moved, memory=True)


# ---- logits --------------------------------------------------------------------------------------


def with_backward(run: Callable, leaf: Tensor) -> Callable:
    """`run`, and the gradient of its sum in `leaf`."""

    def both() -> Tensor | None:
        leaf.grad = None
        out = run()
        out.backward(torch.ones_like(out))
        return leaf.grad

    return both


def token_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Log-probs of ready logits, forward and with the gradient."""
    rows = 2048 if device.type == "cuda" else 64
    rows, vocabulary = (4, 1000) if smoke else (rows, 151_936)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(rows, vocabulary, device=device).to(dtype)
        ids = torch.randint(vocabulary, (rows,), device=device)
        shape = f"({rows}, {vocabulary}) {name_of(dtype)}"
        size = size_of(logits)
        case = partial(Case, "token_logprob", memory=True)
        yield case(f"{shape}, forward", token_logprobs(logits, ids), moved=size)
        leaf = logits.clone().requires_grad_()
        runs = token_logprobs(leaf, ids)
        both = {name: with_backward(run, leaf) for name, run in runs.items()}
        yield case(f"{shape}, forward + backward", both, moved=3 * size)


def token_logprobs(logits: Tensor, ids: Tensor) -> dict[str, Callable]:
    """The log-probs alone, by everyone."""
    ways = {
        "ours": lambda z: token_logprob(z, ids)[0],
        "plain": lambda z: token_logprob(z, ids, path="plain")[0],
        "log_softmax + gather": lambda z: z.log_softmax(-1).gather(1, ids[:, None])[:, 0],
        **peers.token_logprob(ids),
    }
    return {name: partial(way, logits) for name, way in ways.items()}


def linear_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Log-probs straight from hidden rows, alone and with the KL, forward + backward."""
    cuda = device.type == "cuda"
    sizes = (8192, 2048, 151_936) if cuda else (64, 256, 32_000)
    rows, width, vocabulary = (8, 32, 500) if smoke else sizes
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    reference = torch.randn(rows, width, device=device, dtype=dtype)
    head = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
    ids = torch.randint(vocabulary, (rows,), device=device)
    yield linear_case(hidden, head, ids)
    some = min(rows, 1024)  # completions: two dozen positions of a few dozen samples
    states = hidden.detach()[:some].requires_grad_()
    yield paired_case(states, reference[:some], head, ids[:some])


def linear_case(hidden: Tensor, head: Tensor, ids: Tensor) -> Case:
    """One distribution."""

    def full() -> Tensor:
        return (hidden @ head.T).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    runs = beside_plain(partial(linear_logprob, hidden, head, ids))
    runs |= {"full logits": full, **peers.linear_logprob(hidden, head, ids)}
    both = {name: with_backward(run, hidden) for name, run in runs.items()}
    flop = 2 * hidden.numel() * len(head)
    shape = f"{products(hidden, head)}, forward + backward"
    return Case("linear_logprob", shape, both, flop=2 * flop, memory=True)


def paired_case(hidden: Tensor, reference: Tensor, head: Tensor, ids: Tensor) -> Case:
    """Policy and reference, and their KL."""

    def ours(path: str | None = None) -> Tensor:
        return linear_logprob_kl(hidden, reference, head, ids, path=path).kl

    runs = beside_plain(ours)
    runs |= {"full logits": lambda: peers.full_kl(hidden, reference, head)}
    both = {name: with_backward(run, hidden) for name, run in runs.items()}
    flop = 2 * hidden.numel() * len(head)
    shape = f"2 x {products(hidden, head)}, forward + backward"
    return Case("linear_logprob_kl", shape, both, flop=3 * flop, memory=True)


def products(hidden: Tensor, head: Tensor) -> str:
    """The sizes of the product."""
    return f"{tuple(hidden.shape)} x {tuple(head.shape)} {name_of(hidden.dtype)}"


def sample_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """One id of each row."""
    rows = 256 if device.type == "cuda" else 16
    rows, vocabulary = (4, 500) if smoke else (rows, 151_936)
    logits = torch.randn(rows, vocabulary, device=device)
    seed = torch.arange(rows, device=device)
    contenders = beside_plain(partial(sample, logits, temperature=1.0, seed=seed, position=3))
    contenders |= {"softmax + multinomial + gather": lambda: peers.multinomial(logits)}
    shape = f"({rows}, {vocabulary}) float32, T = 1"
    yield Case("sample", shape, contenders, moved=size_of(logits), memory=True)


# ---- a decoder's steps ---------------------------------------------------------------------------


def decode_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """One decode step's attention in one layer of 2B: a group of 8 answers to each image, sharing
    its prefix and question.
    """
    cuda = device.type == "cuda"
    images, group = (2, 2) if smoke else (8, 8) if cuda else (2, 8)
    queries, kv, dim = (4, 2, 16) if smoke else (16, 8, 128)
    dtype = torch.bfloat16 if cuda else torch.float32
    rows = images * group
    sizes = ((images, 310), (images, 100), (rows, 22))

    def drawn() -> list[Tensor]:
        options = {"device": device, "dtype": dtype}
        return [torch.randn(m, kv, tokens, dim, **options) for m, tokens in sizes]

    keys = drawn()
    values = drawn()
    own = torch.arange(rows, device=device)
    owner = torch.stack([own // group, own // group, own])
    length = torch.tensor([[tokens] * rows for _, tokens in sizes], device=device)
    banks = Banks(keys, values, owner, length, locate(keys, values).to(device))
    q = torch.randn(rows, queries, dim, device=device, dtype=dtype)
    contenders = beside_plain(partial(decode_attention, q, banks, scale=dim**-0.5))
    copied = partial(peers.copied_attention, q, keys, values, owner)
    contenders |= {"keys copied to each row + SDPA": copied}
    told = f"{images} x {group} rows, {queries} heads over {kv}, {dim}, 310 + 100 + 22 tokens"
    shape = f"{told}, {name_of(dtype)}"
    yield Case("decode_attention", shape, contenders, moved=size_of(*keys, *values))


def few_rows_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """The products of one decode step of mid-100m, weights one after the other as a step reads
    them; CPU only.
    """
    if device.type != "cpu":
        return
    sizes = [(96, 64), (64, 96)]
    if not smoke:
        layer = [(1280, 640), (640, 640), (3840, 640), (640, 1920)]
        sizes = [*layer * 14, (24_576, 640)]
    weights = [torch.randn(outs, width) for outs, width in sizes]
    for rows in (4, 8, 16, 32, 64):
        yield few_rows_case(rows, weights)


def few_rows_case(rows: int, weights: list[Tensor]) -> Case:
    """All products of a step with so many rows."""
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    def products(product: Callable) -> Callable:
        return lambda: [product(inputs[weight.shape[1]], weight) for weight in weights]

    def one_dnn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], None)

    path = "plain" if native() is None else "native"
    contenders = {
        "ours": products(partial(few_rows, path=path)),
        "plain": products(torch.nn.functional.linear),
        "oneDNN": products(one_dnn),
    }
    size = sum(weight.numel() for weight in weights)
    shape = f"{rows} rows, {len(weights)} weights of {size / 1e6:.1f} M in all"
    return Case("few_rows", shape, contenders, moved=4 * size, flop=2 * rows * size)


class Decoder(NamedTuple):
    """What a layer works on: rows of a decode step and of a prompt, hidden size, query heads, key
    heads, head dimension, MLP width.
    """

    counts: tuple[int, ...]
    width: int
    queries: int
    keys: int
    dim: int
    mlp: int
    dtype: torch.dtype


def decoder(device: torch.device, smoke: bool) -> Decoder:
    """2B on a GPU, mid-100m on a CPU."""
    if smoke:
        return Decoder((3,), 64, 2, 1, 16, 96, torch.float32)
    if device.type == "cuda":
        return Decoder((32, 8192), 2048, 16, 8, 128, 6144, torch.bfloat16)
    return Decoder((16, 832), 640, 10, 5, 64, 1920, torch.float32)


def norm_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """RMS norms, forward and backward."""
    layer = decoder(device, smoke)
    weight = torch.ones(layer.width, device=device, dtype=layer.dtype)
    for rows in layer.counts:
        x = torch.randn(rows, layer.width, device=device, dtype=layer.dtype)
        dz = torch.randn_like(x)
        shape = f"({rows}, {layer.width}) {name_of(layer.dtype)}"
        forward = beside_plain(partial(rms_norm, x, weight, 1e-6))
        yield Case("rms_norm", f"{shape}, forward", forward, moved=2 * size_of(x))
        back = beside_plain(partial(rms_norm_backward, x, weight, dz, 1e-6))
        yield Case("rms_norm", f"{shape}, backward", back, moved=3 * size_of(x))


def swiglu_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Gated products, forward and backward."""
    layer = decoder(device, smoke)
    for rows in layer.counts:
        x = torch.randn(rows, 2 * layer.mlp, device=device, dtype=layer.dtype)
        dz = torch.randn(rows, layer.mlp, device=device, dtype=layer.dtype)
        shape = f"({rows}, 2 x {layer.mlp}) {name_of(layer.dtype)}"
        forward = beside_plain(partial(swiglu, x))
        yield Case("swiglu", f"{shape}, forward", forward, moved=3 * size_of(dz))
        back = beside_plain(partial(swiglu_backward, x, dz))
        yield Case("swiglu", f"{shape}, backward", back, moved=5 * size_of(dz))


def heads_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Queries, keys and values out of one product, forward and backward."""
    layer = decoder(device, smoke)
    queries = layer.queries
    keys = layer.keys
    dim = layer.dim
    every = queries + 2 * keys
    for rows in layer.counts:
        qkv = torch.randn(rows, every * dim, device=device, dtype=layer.dtype)
        weight = torch.ones(dim, device=device, dtype=layer.dtype)
        cos, sin = torch.randn(2, rows, dim // 2, device=device)
        turn = Turn(weight, weight, cos, sin, 1e-6)
        grads = heads(qkv, turn, queries)
        shape = f"{rows} rows, {queries} heads over {keys}, {dim}, {name_of(layer.dtype)}"
        forward = beside_plain(partial(heads, qkv, turn, queries))
        moved = 2 * size_of(qkv) * (queries + keys) // every
        yield Case("heads", f"{shape}, forward", forward, moved=moved)
        back = beside_plain(partial(heads_backward, qkv, turn, grads))
        yield Case("heads", f"{shape}, backward", back, moved=3 * size_of(qkv))


def raised_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """What follows a product with LoRA of rank 16, raised in passing."""
    layer = decoder(device, smoke)
    rank = 16
    made = {"device": device, "dtype": layer.dtype}
    weight = torch.ones(layer.width, **made)
    up = torch.randn(layer.width, rank, **made)
    both = torch.block_diag(*torch.randn(2, layer.mlp, rank, **made))
    for rows in layer.counts:
        shape = f"{rows} rows, rank {rank}, {name_of(layer.dtype)}"
        x = torch.randn(rows, layer.width, **made)
        wide = torch.randn(rows, layer.width + rank, **made)
        out = beside_plain(partial(raised_norm, x, wide, up, weight, 1e-6))
        yield Case("raised_norm", shape, out, moved=4 * size_of(x))
        wide = torch.randn(rows, 2 * (layer.mlp + rank), **made)
        inner = beside_plain(partial(raised_swiglu, wide, both, layer.mlp))
        yield Case("raised_swiglu", shape, inner, moved=3 * size_of(wide) // 2)
        yield raised_heads_case(layer, rows, made, shape)


def raised_heads_case(layer: Decoder, rows: int, made: dict, shape: str) -> Case:
    """Attention's way in."""
    rank = 16
    counts = (layer.queries, layer.keys, layer.keys)
    up = torch.block_diag(*(torch.randn(count * layer.dim, rank, **made) for count in counts))
    wide = torch.randn(rows, len(up) + up.shape[1], **made)
    weight = torch.ones(layer.dim, **made)
    cos, sin = torch.randn(2, rows, layer.dim // 2, device=made["device"])
    turn = Turn(weight, weight, cos, sin, 1e-6)
    run = beside_plain(partial(raised_heads, wide, up, turn, layer.queries))
    return Case("raised_heads", shape, run, moved=2 * size_of(wide))


def lora_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """The gradients of a group's up factors, and the masters of a layer taken over."""
    layer = decoder(device, smoke)
    made = {"device": device, "dtype": layer.dtype}
    widths = [layer.queries * layer.dim, layer.keys * layer.dim, layer.keys * layer.dim]
    rows = layer.counts[-1]
    grad = torch.randn(rows, sum(widths), **made)
    high = torch.randn(rows, 48, **made)
    run = partial(up_gradient, grad, high, widths, [1.0, 1.0, 1.0], torch.float32)
    yield Case("up_gradient", f"{rows} rows", beside_plain(run), moved=size_of(grad))
    sources = [torch.randn(16, width, device=device) for width in widths * 4]
    targets = [torch.empty_like(source, dtype=layer.dtype) for source in sources]
    ones = [1.0] * len(sources)
    contenders = {"ours": Recast(sources, targets, ones)}
    contenders["plain"] = Recast(sources, targets, ones, path="plain")
    yield Case("recast", f"{len(sources)} masters", contenders, moved=size_of(*sources, *targets))


def merge_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Three parts of attention."""
    layer = decoder(device, smoke)
    shape = (layer.counts[0], 4, layer.queries, layer.dim)
    outs = [torch.randn(shape, device=device, dtype=layer.dtype) for _ in range(3)]
    lses = [torch.randn(shape[:3], device=device) for _ in range(3)]
    run = beside_plain(partial(merge_attention, outs, lses))
    yield Case("merge_attention", str(shape), run, moved=4 * size_of(outs[0]))


def vision_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """What the vision tower does between products: patches of one picture."""
    patches, width, count = (8, 64, 2) if smoke else (1200, 1024, 16)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = {"device": device, "dtype": dtype}
    x = torch.randn(patches, width, **made)
    affine = Affine(torch.ones(width, **made), torch.zeros(width, **made), 1e-6)
    run = beside_plain(partial(add_layer_norm, x, torch.randn_like(x), affine))
    yield Case("add_layer_norm", f"({patches}, {width})", run, moved=4 * size_of(x))
    heads_ = torch.randn(patches, 2 * count, width // count, **made)
    cos, sin = torch.randn(2, patches, width // count // 2, device=device)
    run = beside_plain(partial(rotate, heads_, cos, sin))
    yield Case("rotate", f"{tuple(heads_.shape)}", run, moved=2 * size_of(heads_))


def unpack_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """2B's gate projection, held in 4 bits with scales in 8, and in 8 bits."""
    rows, width = (48, 64) if smoke else (6144, 2048)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = {"device": device, "dtype": torch.uint8}
    size = rows * width
    scales = torch.randint(0, 256, (size // 64,), **made)
    of = torch.rand(-(-len(scales) // 256), device=device)
    levels = torch.linspace(-1, 1, 16, device=device)
    codes = torch.linspace(-1, 1, 256, device=device)
    coarse = Coarse(codes, of, torch.tensor(0.1, device=device), 256)
    held = Nibbles(torch.randint(0, 256, (size // 2, 1), **made), levels, scales, 64, coarse)
    run = beside_plain(partial(unpack_nf4, held, (rows, width), dtype))
    run |= peers.unpack(held, (rows, width), dtype)
    written = size * dtype.itemsize
    told = f"({rows}, {width}) to {name_of(dtype)}"
    yield Case("unpack_nf4", told, run, moved=written + size_of(held.bytes, scales))
    whole = torch.randint(-128, 128, (rows, width), device=device, dtype=torch.int8)
    run = beside_plain(partial(unpack_int8, whole, torch.rand(rows, device=device), dtype))
    yield Case("unpack_int8", told, run, moved=written + size)


class Prompt(NamedTuple):
    """Box questions of one layer."""

    rows: int
    tokens: int
    queries: int
    keys: int
    dim: int
    prefix: int


def attention_cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """A layer's box questions: each row sees its image's prefix and itself; CPU only."""
    if device.type != "cpu":
        return
    prompts = [Prompt(8, 104, 10, 5, 64, 21), Prompt(8, 104, 10, 5, 64, 305)]
    for prompt in [Prompt(2, 5, 2, 1, 16, 7)] if smoke else prompts:
        yield attention_case(prompt)


def attention_case(p: Prompt) -> Case:
    """Both banks at once, against joined keys and a mask."""
    q = torch.randn(p.rows, p.tokens, p.queries, p.dim)
    own = [torch.randn(p.rows, p.keys, p.tokens, p.dim) for _ in range(2)]
    shared = [torch.randn(p.rows, p.keys, p.prefix, p.dim) for _ in range(2)]
    banks = [Bank(*shared, torch.arange(p.rows)), Bank(*own)]
    before = torch.ones(p.tokens, p.prefix, dtype=torch.bool)
    mask = torch.cat([before, torch.ones(p.tokens, p.tokens, dtype=torch.bool).tril()], 1)

    def joined() -> Tensor:
        keys, values = (torch.cat(pair, 2) for pair in zip(shared, own, strict=True))
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
        )

    contenders = beside_plain(partial(attention, q, banks, scale=p.dim**-0.5, causal=True))
    contenders |= {"banks joined + SDPA": joined}
    pairs = p.tokens * p.prefix + p.tokens * (p.tokens + 1) // 2
    flop = 4 * p.rows * p.queries * p.dim * pairs
    shape = f"{p.rows} x {p.tokens} tokens after {p.prefix}, {p.queries} heads over {p.keys}"
    return Case("attention", f"{shape}, {p.dim}", contenders, flop=flop)


CASES = {
    "ghost": image_cases,
    "warp": image_cases,
    "resize": patch_cases,
    "patchify": patch_cases,
    "token_logprob": token_cases,
    "linear_logprob": linear_cases,
    "sample": sample_cases,
    "decode_attention": decode_cases,
    "few_rows": few_rows_cases,
    "attention": attention_cases,
    "rms_norm": norm_cases,
    "heads": heads_cases,
    "swiglu": swiglu_cases,
    "raised_norm": raised_cases,
    "raised_swiglu": raised_cases,
    "raised_heads": raised_cases,
    "up_gradient": lora_cases,
    "recast": lora_cases,
    "merge_attention": merge_cases,
    "add_layer_norm": vision_cases,
    "rotate": vision_cases,
    "unpack_nf4": unpack_cases,
    "unpack_int8": unpack_cases,
}


# ---- measuring and telling -----------------------------------------------------------------------


def measured(case: Case, device: torch.device, ceilings: dict[str, float], smoke: bool) -> dict:
    """The case's times, ratios to ours, distance to the ceiling and extra memory, as plain data."""
    often = {"repeats": 1, "least_s": 0} if smoke else {"repeats": 7, "least_s": 0.1}
    times = measure.interleaved(case.contenders, device, **often)
    by_copy = case.moved / ceilings["copy_bytes_per_s"]
    by_product = case.flop / ceilings["matmul_flop_per_s"]
    least = max(by_copy, by_product)
    ours = times["ours"].median
    path, reason = vise_kernels.available()[case.op.split(" ")[0]]
    row = {
        "op": case.op,
        "shape": case.shape,
        "path": path,
        "reason": reason,
        "ceiling_s": least,
        "share_of_ceiling": least / ours,
    }
    row["contenders"] = {
        name: {**time.summary(), "times_ours": time.median / ours} for name, time in times.items()
    }
    if case.memory:
        for name, run in case.contenders.items():
            row["contenders"][name]["extra_bytes"] = measure.extra_bytes(run, device)
    return row


def print_row(row: dict, device: torch.device) -> None:
    """Ours with its share of the ceiling, then how many times longer each other contender takes."""
    contenders = dict(row["contenders"])
    ours = contenders.pop("ours")
    time = f"{1e3 * ours['median_s']:.3f} ms, " if device.type == "cuda" else ""
    share = f"{time}{row['share_of_ceiling']:.0%} of the ceiling{memory(ours)}"
    print(f"\n{row['op']}  {row['shape']}\n  ours ({row['path']})  {share}")
    for name, other in contenders.items():
        low = other["least_s"] / ours["most_s"]
        high = other["most_s"] / ours["least_s"]
        spread = f"{other['times_ours']:8.2f} x our time  ({low:.2f}..{high:.2f})"
        print(f"  {name:<44}{spread}{memory(other)}")


def memory(contender: dict) -> str:
    """Its extra memory, where that was measured."""
    extra = contender.get("extra_bytes")
    return "" if extra is None else f", {extra / 1e6:.2f} MB extra"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=[*CASES, "all"], default="all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one repeat")
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/kernels-<device>.json"
    )
    return parser.parse_args()


def cases(op: str, device: torch.device, smoke: bool) -> Iterator[Case]:
    """Of one op, or of all."""
    makers = dict.fromkeys(CASES.values() if op == "all" else [CASES[op]])
    for maker in makers:
        for case in maker(device, smoke):
            if op in ("all", *case.op.replace("_kl", "").split(" + ")):
                yield case


def main() -> None:
    """Measure, tell, and write where asked to."""
    chosen = parse()
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if chosen.device == "auto" else chosen.device)
    if device.type == "cpu":
        peers.one_thread()
    ceilings = measure.ceilings(device, chosen.smoke)
    print(
        f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s"
    )
    rows = []
    for case in cases(chosen.op, device, chosen.smoke):
        rows.append(measured(case, device, ceilings, chosen.smoke))
        print_row(rows[-1], device)
    sources = ("kernels.py", "_measure.py", "_peers.py")
    paths = ("kernels", *(f"bench/{name}" for name in sources), "CMakeLists.txt")
    results = {"bench": "kernels", **measure.machine(device, paths), "ceilings": ceilings}
    results |= {"missing_peers": peers.missing(), "rows": rows}
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device).split()[-1].lower() if cuda else "cpu"
    place = _checkout.ROOT / "bench" / "results" / f"kernels-{card}.json"
    measure.finish(results, place if chosen.write else None)


if __name__ == "__main__":
    main()
