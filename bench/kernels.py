"""Every op of vise_kernels beside its plain version, beside the peers that are installed, and
beside the machine's ceilings.

    python bench/kernels.py                          on the GPU if there is one (Triton), else on
    one CPU thread (native C++)
    python bench/kernels.py --op ghost --write       one op; --write puts the document under
    bench/results/
    python bench/kernels.py --smoke                  tiny shapes, one repeat: does everything run?

Contenders of a case do the same work on the same inputs; `ours` is the path that the op takes by
itself. "ceiling" is the time the case's bytes or FLOPs would take at the copy bandwidth or matmul
rate measured in the same run, as a share of our time (above 100 %: the data fit a cache, which the
copy does not). Figures from a CPU are ratios: its seconds are in the JSON only. Left out:
correctness (tests/kernels/).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import _measure as measure  # noqa: E402
import _peers as peers  # noqa: E402
import vise_kernels  # noqa: E402
from vise_kernels import (  # noqa: E402
    attention,
    decode_attention,
    few_rows,
    ghost,
    heads,
    heads_backward,
    linear_logprob,
    linear_logprob_kl,
    patchify,
    resize,
    rms_norm,
    rms_norm_backward,
    sample,
    swiglu,
    swiglu_backward,
    token_logprob,
    warp,
)
from vise_kernels.attention import Bank  # noqa: E402
from vise_kernels.decode_attention import Banks, locate  # noqa: E402
from vise_kernels.dispatch import native  # noqa: E402
from vise_kernels.heads import Turn  # noqa: E402


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


def noise(count: int, height: int, width: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pictures = [
        torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        for _ in range(count)
    ]
    return [picture.to(device) for picture in pictures]


def random_boxes(count: int, height: int, width: int) -> torch.Tensor:
    """Sides uniform over 0.1..0.7 of the image's, places uniform."""
    generator = torch.Generator().manual_seed(1)
    share, place = torch.rand(2, count, 2, generator=generator)
    sides = (0.1 + 0.6 * share) * torch.tensor([width, height])
    corner = place * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], 1).round().long()


def image_cases(device: torch.device, smoke: bool):
    count = 2 if smoke else 64 if device.type == "cuda" else 16
    height, width = (96, 128) if smoke else (480, 640)
    images = noise(count, height, width, device)
    index = torch.arange(count)
    boxes = random_boxes(count, height, width)
    pixels = count * height * width * 3
    shape = f"{count} x {height}x{width}"
    for sigma, radius in ((25.0, 75), (25.0, 25)):
        options = {"sigma": sigma, "radius": radius}
        contenders = {
            "ours": lambda options=options: ghost(images, index, boxes, **options),
            "plain": lambda options=options: ghost(images, index, boxes, **options, path="plain"),
            **peers.ghost(images, boxes, sigma, radius),
        }
        yield Case(
            "ghost",
            f"{shape}, blur, {2 * radius + 1} taps, random boxes",
            contenders,
            moved=2 * pixels,
        )
    for method in ("mean", "pixelate"):
        contenders = {
            "ours": lambda method=method: ghost(images, index, boxes, method=method),
            "plain": lambda method=method: ghost(images, index, boxes, method=method, path="plain"),
        }
        yield Case("ghost", f"{shape}, {method}, random boxes", contenders, moved=2 * pixels)
    yield warp_case(images, shape, pixels)


def turned(count: int) -> torch.Tensor:
    """(count,3,3): a rotation by 10 degrees, with a shift that keeps most of a 640x480 image in
    sight.
    """
    turn = torch.tensor(
        [[0.98, -0.17, 60.0], [0.17, 0.98, -40.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    return turn.expand(count, 3, 3).contiguous()


def warp_case(images: list[torch.Tensor], shape: str, pixels: int) -> Case:
    height, width = images[0].shape[:2]
    matrices = turned(len(images))
    contenders = {
        "ours": lambda: warp(images, matrices),
        "plain": lambda: warp(images, matrices, path="plain"),
        **peers.warp(images, matrices),
    }
    return Case("warp", f"{shape}, rotation by 10 degrees", contenders, moved=2 * pixels)


def patch_cases(device: torch.device, smoke: bool):
    count = 1 if smoke else 32 if device.type == "cuda" else 4
    old, new = ((96, 128), (64, 96)) if smoke else ((768, 1024), (480, 640))
    images = noise(count, *old, device)
    small = noise(count, *new, device)
    sizes = [new] * count
    options = {"patch": 16, "merge": 2}
    read = count * old[0] * old[1] * 3
    kept = count * new[0] * new[1] * 3
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    item = torch.empty(0, dtype=dtype).element_size()
    contenders = {
        "ours": lambda: resize(images, sizes),
        "plain": lambda: resize(images, sizes, path="plain"),
        **peers.resize(images, new),
    }
    yield Case(
        "resize", f"{count} x {old[0]}x{old[1]} to {new[0]}x{new[1]}", contenders, moved=read + kept
    )
    for single in (False, True):
        case = {**options, "dtype": dtype, "single_tap": single}
        contenders = {
            "ours": lambda case=case: patchify(small, **case),
            "plain": lambda case=case: patchify(small, **case, path="plain"),
        }
        taps = "one tap" if single else "two taps"
        yield Case(
            "patchify",
            f"{count} x {new[0]}x{new[1]}, {taps}",
            contenders,
            moved=kept * (1 + item * (1 if single else 2)),
        )
    yield warped_case(small, {**options, "dtype": dtype, "single_tap": True}, kept * (1 + item))
    contenders = {
        "ours": lambda: patchify(resize(images, sizes), **options, dtype=dtype),
        "plain": lambda: patchify(
            resize(images, sizes, path="plain"), **options, dtype=dtype, path="plain"
        ),
        **peers.stock_processor(images, new),
    }
    yield Case(
        "resize + patchify",
        f"{count} x {old[0]}x{old[1]} to {new[0]}x{new[1]}",
        contenders,
        moved=read + 2 * kept + 2 * item * kept,
    )


def warped_case(images: list[torch.Tensor], options: dict, moved: int) -> Case:
    """Ours reads patches through the matrices; the others write the warped images first."""
    height, width = images[0].shape[:2]
    matrices = turned(len(images))
    contenders = {
        "ours": lambda: patchify(images, matrices_px=matrices, **options),
        "warp, then patchify": lambda: patchify(warp(images, matrices), **options),
        "plain": lambda: patchify(images, matrices_px=matrices, **options, path="plain"),
    }
    return Case(
        "warp + patchify",
        f"{len(images)} x {height}x{width}, rotation by 10 degrees, one tap",
        contenders,
        moved=moved,
        memory=True,
    )


def with_backward(run: Callable, leaf: torch.Tensor) -> Callable:
    def both():
        leaf.grad = None
        out = run()
        out.backward(torch.ones_like(out))
        return leaf.grad

    return both


def token_cases(device: torch.device, smoke: bool):
    rows, vocabulary = (
        (4, 1000) if smoke else (2048, 151_936) if device.type == "cuda" else (64, 151_936)
    )
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(rows, vocabulary, device=device).to(dtype)
        ids = torch.randint(vocabulary, (rows,), device=device)
        runs = {
            "ours": lambda x, ids=ids: token_logprob(x, ids)[0],
            "plain": lambda x, ids=ids: token_logprob(x, ids, path="plain")[0],
            "log_softmax + gather": lambda x, ids=ids: x.log_softmax(-1).gather(1, ids[:, None])[
                :, 0
            ],
            **peers.token_logprob(ids),
        }
        shape = f"({rows}, {vocabulary}) {str(dtype)[6:]}"
        size = logits.numel() * logits.element_size()
        forward = {name: lambda run=run, x=logits: run(x) for name, run in runs.items()}
        yield Case("token_logprob", f"{shape}, forward", forward, moved=size, memory=True)
        leaf = logits.clone().requires_grad_()
        both = {
            name: with_backward(lambda run=run, x=leaf: run(x), leaf) for name, run in runs.items()
        }
        yield Case(
            "token_logprob", f"{shape}, forward + backward", both, moved=3 * size, memory=True
        )


def linear_cases(device: torch.device, smoke: bool):
    cuda = device.type == "cuda"
    rows, width, vocabulary = (
        (8, 32, 500) if smoke else (8192, 2048, 151_936) if cuda else (64, 256, 32_000)
    )
    dtype = torch.bfloat16 if cuda else torch.float32
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    reference = torch.randn(rows, width, device=device, dtype=dtype)
    head = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
    ids = torch.randint(vocabulary, (rows,), device=device)
    flop = 2 * rows * width * vocabulary
    shape = f"({rows}, {width}) x ({vocabulary}, {width}) {str(dtype)[6:]}"
    single = {
        "ours": lambda: linear_logprob(hidden, head, ids),
        "plain": lambda: linear_logprob(hidden, head, ids, path="plain"),
        "full logits": lambda: (
            (hidden @ head.T).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        ),
        **peers.linear_logprob(hidden, head, ids),
    }
    both = {name: with_backward(run, hidden) for name, run in single.items()}
    yield Case("linear_logprob", f"{shape}, forward + backward", both, flop=2 * flop, memory=True)
    rows = min(rows, 1024)  # completions: two dozen positions of a few dozen samples
    states = hidden.detach()[:rows].requires_grad_()
    others = reference[:rows]
    chosen = ids[:rows]
    paired = {
        "ours": lambda: linear_logprob_kl(states, others, head, chosen)[2],
        "plain": lambda: linear_logprob_kl(states, others, head, chosen, path="plain")[2],
        "full logits": lambda: peers.full_kl(states, others, head),
    }
    both = {name: with_backward(run, states) for name, run in paired.items()}
    shape = f"2 x ({rows}, {width}) x ({vocabulary}, {width}) {str(dtype)[6:]}"
    yield Case(
        "linear_logprob_kl",
        f"{shape}, forward + backward",
        both,
        flop=3 * 2 * rows * width * vocabulary,
        memory=True,
    )


def sample_cases(device: torch.device, smoke: bool):
    rows, vocabulary = (
        (4, 500) if smoke else (256, 151_936) if device.type == "cuda" else (16, 151_936)
    )
    logits = torch.randn(rows, vocabulary, device=device)
    seed = torch.arange(rows, device=device)
    contenders = {
        "ours": lambda: sample(logits, temperature=1.0, seed=seed, position=3),
        "plain": lambda: sample(logits, temperature=1.0, seed=seed, position=3, path="plain"),
        "softmax + multinomial + gather": lambda: peers.multinomial(logits),
    }
    yield Case(
        "sample",
        f"({rows}, {vocabulary}) float32, T = 1",
        contenders,
        moved=logits.numel() * 4,
        memory=True,
    )


def decode_cases(device: torch.device, smoke: bool):
    """One decode step's attention in one layer of 2B: a group of 8 answers to each image, sharing
    its prefix and question.
    """
    images, group, (heads, kv, dim) = (
        (2, 2, (4, 2, 16))
        if smoke
        else (8, 8, (16, 8, 128))
        if device.type == "cuda"
        else (2, 8, (16, 8, 128))
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = images * group
    sizes = ((images, 310), (images, 100), (images * group, 22))
    keys, values = (
        [torch.randn(m, kv, tokens, dim, device=device, dtype=dtype) for m, tokens in sizes]
        for _ in range(2)
    )
    own = torch.arange(rows, device=device)
    owner = torch.stack([own // group, own // group, own])
    length = (
        torch.tensor([tokens for _, tokens in sizes], device=device)[:, None]
        .expand(-1, rows)
        .contiguous()
    )
    banks = Banks(keys, values, owner, length, locate(keys, values).to(device))
    q = torch.randn(rows, heads, dim, device=device, dtype=dtype)
    contenders = {
        "ours": lambda: decode_attention(q, banks, scale=dim**-0.5),
        "plain": lambda: decode_attention(q, banks, scale=dim**-0.5, path="plain"),
        "keys copied to each row + SDPA": lambda: peers.copied_attention(q, keys, values, owner),
    }
    moved = sum(bank.numel() * bank.element_size() for bank in (*keys, *values))
    yield Case(
        "decode_attention",
        (
            f"{images} x {group} rows, {heads} heads over {kv}, {dim}, 310 + 100 + 22 tokens, "
            f"{str(dtype)[6:]}"
        ),
        contenders,
        moved=moved,
    )


def few_rows_cases(device: torch.device, smoke: bool):
    """The products of one decode step of mid-100m, weights one after the other as a step reads
    them; CPU only.
    """
    if device.type != "cpu":
        return
    sizes = (
        [(96, 64), (64, 96)]
        if smoke
        else [(1280, 640), (640, 640), (3840, 640), (640, 1920)] * 14 + [(24_576, 640)]
    )
    weights = [torch.randn(outs, width) for outs, width in sizes]
    path = "plain" if native() is None else "native"
    for rows in (4, 8, 16, 32, 64):
        inputs = {width: torch.randn(rows, width) for _, width in sizes}
        products = lambda product, inputs=inputs: (
            lambda: [product(inputs[weight.shape[1]], weight) for weight in weights]
        )
        contenders = {
            "ours": products(lambda x, w: few_rows(x, w, path=path)),
            "plain": products(torch.nn.functional.linear),
        }
        contenders["oneDNN"] = products(
            lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], None)
        )
        size = sum(weight.numel() for weight in weights)
        yield Case(
            "few_rows",
            f"{rows} rows, {len(weights)} weights of {size / 1e6:.1f} M in all",
            contenders,
            moved=4 * size,
            flop=2 * rows * size,
        )


def decoder(device: torch.device, smoke: bool):
    """Rows, (hidden, query heads, key heads, dim, mlp) and dtype of a decoder layer's work: a
    decode step and a prompt.
    """
    if smoke:
        return (3,), (64, 2, 1, 16, 96), torch.float32
    if device.type == "cuda":
        return (32, 8192), (2048, 16, 8, 128, 6144), torch.bfloat16
    return (16, 832), (640, 10, 5, 64, 1920), torch.float32


def norm_cases(device: torch.device, smoke: bool):
    counts, (width, *_), dtype = decoder(device, smoke)
    for rows in counts:
        x, dz = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
        weight = torch.ones(width, device=device, dtype=dtype)
        size = x.numel() * x.element_size()
        shape = f"({rows}, {width}) {str(dtype)[6:]}"
        forward = {
            "ours": lambda: rms_norm(x, weight, 1e-6),
            "plain": lambda: rms_norm(x, weight, 1e-6, path="plain"),
        }
        yield Case("rms_norm", f"{shape}, forward", forward, moved=2 * size)
        back = {
            "ours": lambda: rms_norm_backward(x, weight, dz, 1e-6),
            "plain": lambda: rms_norm_backward(x, weight, dz, 1e-6, path="plain"),
        }
        yield Case("rms_norm", f"{shape}, backward", back, moved=3 * size)


def swiglu_cases(device: torch.device, smoke: bool):
    counts, (*_, width), dtype = decoder(device, smoke)
    for rows in counts:
        x = torch.randn(rows, 2 * width, device=device, dtype=dtype)
        dz = torch.randn(rows, width, device=device, dtype=dtype)
        size = dz.numel() * dz.element_size()
        shape = f"({rows}, 2 x {width}) {str(dtype)[6:]}"
        yield Case(
            "swiglu",
            f"{shape}, forward",
            {"ours": lambda: swiglu(x), "plain": lambda: swiglu(x, path="plain")},
            moved=3 * size,
        )
        back = {
            "ours": lambda: swiglu_backward(x, dz),
            "plain": lambda: swiglu_backward(x, dz, path="plain"),
        }
        yield Case("swiglu", f"{shape}, backward", back, moved=5 * size)


def heads_cases(device: torch.device, smoke: bool):
    counts, (_, queries, keys, dim, _), dtype = decoder(device, smoke)
    for rows in counts:
        qkv = torch.randn(rows, (queries + 2 * keys) * dim, device=device, dtype=dtype)
        weights = [torch.ones(dim, device=device, dtype=dtype) for _ in range(2)]
        turn = Turn(*weights, *(torch.randn(rows, dim // 2, device=device) for _ in range(2)), 1e-6)
        grads = heads(qkv, turn, queries)
        size = qkv.numel() * qkv.element_size()
        shape = f"{rows} rows, {queries} heads over {keys}, {dim}, {str(dtype)[6:]}"
        forward = {
            "ours": lambda: heads(qkv, turn, queries),
            "plain": lambda: heads(qkv, turn, queries, path="plain"),
        }
        yield Case(
            "heads",
            f"{shape}, forward",
            forward,
            moved=2 * size * (queries + keys) // (queries + 2 * keys),
        )
        back = {
            "ours": lambda: heads_backward(qkv, turn, grads),
            "plain": lambda: heads_backward(qkv, turn, grads, path="plain"),
        }
        yield Case("heads", f"{shape}, backward", back, moved=3 * size)


def attention_cases(device: torch.device, smoke: bool):
    """A layer's box questions: each row sees its image's prefix and itself; CPU only."""
    if device.type != "cpu":
        return
    sizes = ((2, 5, 2, 1, 16, 7),) if smoke else ((8, 104, 10, 5, 64, 21), (8, 104, 10, 5, 64, 305))
    for rows, tokens, queries, keys, dim, prefix in sizes:
        q = torch.randn(rows, tokens, queries, dim)
        own = [torch.randn(rows, keys, tokens, dim) for _ in range(2)]
        shared = [torch.randn(rows, keys, prefix, dim) for _ in range(2)]
        banks = [Bank(*shared, torch.arange(rows)), Bank(*own)]
        mask = torch.cat(
            [
                torch.ones(tokens, prefix, dtype=torch.bool),
                torch.ones(tokens, tokens, dtype=torch.bool).tril(),
            ],
            1,
        )
        joined = lambda q=q, own=own, shared=shared, mask=mask: (
            torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2),
                *(torch.cat(pair, 2) for pair in zip(shared, own, strict=True)),
                attn_mask=mask,
                enable_gqa=True,
            )
        )
        run = lambda path=None, q=q, banks=banks, dim=dim: attention(
            q, banks, scale=dim**-0.5, causal=True, path=path
        )
        contenders = {
            "ours": run,
            "plain": lambda run=run: run("plain"),
            "banks joined + SDPA": joined,
        }
        flop = 4 * rows * queries * dim * (tokens * prefix + tokens * (tokens + 1) // 2)
        yield Case(
            "attention",
            f"{rows} x {tokens} tokens after {prefix}, {queries} heads over {keys}, {dim}",
            contenders,
            flop=flop,
        )


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
}


def measured(case: Case, device: torch.device, ceilings: dict[str, float], smoke: bool) -> dict:
    """The case's times, ratios to ours, distance to the ceiling and extra memory, as plain data."""
    times = measure.interleaved(
        case.contenders, device, repeats=1 if smoke else 7, least_s=0 if smoke else 0.1
    )
    least = max(
        case.moved / ceilings["copy_bytes_per_s"], case.flop / ceilings["matmul_flop_per_s"]
    )
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
    time = (
        f"{1e3 * row['contenders']['ours']['median_s']:.3f} ms, " if device.type == "cuda" else ""
    )
    print(
        (
            f"\n{row['op']}  {row['shape']}\n  ours ({row['path']})  "
            f"{time}{row['share_of_ceiling']:.0%} of the ceiling"
        )
        + memory(row, "ours")
    )
    for name, other in row["contenders"].items():
        if name != "ours":
            ours = row["contenders"]["ours"]
            spread = (
                f"{other['least_s'] / ours['most_s']:.2f}..{other['most_s'] / ours['least_s']:.2f}"
            )
            print(
                f"  {name:<44}{other['times_ours']:8.2f} x our time  ({spread})" + memory(row, name)
            )


def memory(row: dict, name: str) -> str:
    extra = row["contenders"][name].get("extra_bytes")
    return "" if extra is None else f", {extra / 1e6:.2f} MB extra"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=[*CASES, "all"], default="all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one repeat")
    parser.add_argument(
        "--write", action="store_true", help="write bench/results/kernels-<device>.json"
    )
    chosen = parser.parse_args()
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if chosen.device == "auto"
        else torch.device(chosen.device)
    )
    if device.type == "cpu":
        peers.one_thread()
    ceilings = measure.ceilings(device, chosen.smoke)
    print(
        f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, matmul "
        f"{ceilings['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s"
    )
    makers = dict.fromkeys(CASES.values() if chosen.op == "all" else [CASES[chosen.op]])
    rows = []
    for maker in makers:
        for case in maker(device, chosen.smoke):
            if chosen.op in ("all", *case.op.replace("_kl", "").split(" + ")):
                rows.append(measured(case, device, ceilings, chosen.smoke))
                print_row(rows[-1], device)
    facts = measure.machine(
        device,
        ("kernels", "bench/kernels.py", "bench/_measure.py", "bench/_peers.py", "CMakeLists.txt"),
    )
    results = {
        "bench": "kernels",
        **facts,
        "ceilings": ceilings,
        "missing_peers": peers.missing(),
        "rows": rows,
    }
    name = (
        "kernels-cpu.json"
        if device.type == "cpu"
        else f"kernels-{torch.cuda.get_device_name(device).split()[-1].lower()}.json"
    )
    measure.finish(results, ROOT / "bench" / "results" / name if chosen.write else None)


if __name__ == "__main__":
    main()
