"""Compiles the Triton kernels of the log-prob ops, of sampling, of decoding and of the decoder's
pointwise steps to machine code for one GPU generation and dtype; needs no GPU.

    python compile_token_kernels.py 86 fp32

The interpreter accepts what the compiler does not (types that drift in a loop, shapes that cannot
be tiled), so this is the only look at the compiled form on a machine without a GPU. Run by
test_triton_compiles.py in a process of its own, because interpreted kernels cannot be compiled.
Prints a line per kernel: registers of a thread, bytes spilled, bytes of shared memory.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vise_kernels.decode_attention import block_of

FLOATS = "*fp32"
LONGS = "*i64"
BYTES = "*u8"
INT = "i32"


def token_logprob(z):
    sizes = {"columns": INT, "stride": INT}
    yield (
        "_partial_kernel",
        {"logits": z, "partials": FLOATS, **sizes, "splits": INT},
        {"BLOCK": 4096},
    )
    yield (
        "_merge_kernel",
        {"partials": FLOATS, "logits": z, "ids": LONGS, "results": FLOATS, **sizes, "splits": INT},
        {"SPLITS": 64},
    )
    yield (
        "_backward_kernel",
        {"logits": z, "ids": LONGS, "results": FLOATS, "grads": FLOATS, "grad": z, **sizes},
        {"BLOCK": 4096},
    )


def sample(z):
    for banned in (BYTES, None):
        rows = {
            "temperature": FLOATS,
            "seed": LONGS,
            "position": LONGS,
            "partials": FLOATS,
            "best_ids": "*i32",
        }
        sizes = {"columns": INT, "stride": INT, "splits": INT}
        yield "_partial_kernel", {"logits": z, "banned": banned, **rows, **sizes}, {"BLOCK": 1024}
        parts = {
            "partials": FLOATS,
            "best_ids": "*i32",
            "logits": z,
            "banned": banned,
            "ids": LONGS,
            "logprob": FLOATS,
        }
        yield "_merge_kernel", {**parts, "stride": INT, "splits": INT}, {"SPLITS": 64}


def linear_logprob(h):
    yield (
        "_rescale_kernel",
        {"averages": FLOATS, "factor": FLOATS, "rows": INT, "width": INT},
        {"BLOCK": 2048},
    )
    sums = dict.fromkeys(("top", "total", "target", "drift", "factor"), FLOATS)
    totals = dict.fromkeys(("averages", "total", "drift"), FLOATS)
    sizes = dict.fromkeys(("plane", "vocabulary", "width", "head_stride", "head_step"), INT)
    for paired, weights, banned in ((False, None, None), (True, h, BYTES)):
        constants = {"PAIRED": paired, "BLOCK": 2048}
        ids = {"ids": LONGS, "banned": banned}
        logits = {"logits": FLOATS, "weights": weights, "first": INT}
        yield "_merge_kernel", {**logits, **ids, **sums, "width": INT}, constants
        yield "_finish_kernel", {**totals, "head": h, **ids, "slope": h, **sizes}, constants


def decode_attention(q):
    rows = {"owner": LONGS, "length": LONGS, "table": LONGS}
    block = block_of(torch.float32 if q == "*fp32" else torch.bfloat16)
    sizes = {"BANKS": 3, "GROUP": 2, "TILE": 16, "DIM": 128, "WIDE": 128, **block}
    yield (
        "_partial_kernel",
        {"q": q, **rows, "partial": FLOATS, "lse": FLOATS, "scale": "fp32"},
        sizes,
    )
    yield (
        "_merge_kernel",
        {"partial": FLOATS, "lse": FLOATS, "out": q},
        {"SPLITS": 5, "LANES": 8, "DIM": 40, "WIDE": 64},
    )


def swiglu(x):
    yield "_kernel", {"x": x, "z": x, "width": INT}, {"BLOCK": 1024}
    yield "_backward_kernel", {"x": x, "dz": x, "dx": x, "width": INT}, {"BLOCK": 1024}


def rms_norm(x):
    sizes = {"width": INT, "eps": "fp32"}
    for block in (2048, 4096):
        yield "_kernel", {"x": x, "weight": x, "z": x, **sizes}, {"BLOCK": block}
        yield (
            "_backward_kernel",
            {"x": x, "weight": x, "dz": x, "dx": x, **sizes},
            {"BLOCK": block},
        )


def merge_attention(x):
    given = {"merged": x, "total": FLOATS, "tokens": INT, "heads": INT}
    for p in range(3):
        strides = [f"{name}{p}_{axis}" for name in ("out", "lse") for axis in "mftkr"]
        given |= dict.fromkeys([f"fan{p}", f"repeat{p}", *strides], INT)
        given |= {f"out{p}": x, f"lse{p}": FLOATS}
    for parts, dim, wide in ((2, 40, 64), (3, 128, 128)):
        yield "_kernel", given, {"PARTS": parts, "DIM": dim, "WIDE": wide, "HEADS": 8}


def up_gradient(x):
    ends = dict.fromkeys(("rows", "end0", "end1", "end2"), INT)
    scales = dict.fromkeys(("scale0", "scale1", "scale2"), "fp32")
    given = {"grad": x, "high": x, "out": FLOATS, **ends, **scales}
    for rank, wide in ((16, 16), (40, 64)):
        sizes = {"RANK": rank, "WIDE": wide, "OUTS": 64, "ROWS": 64, "EXACT": x == "*fp32"}
        yield "_kernel", given, sizes


def raised(x):
    strides = dict.fromkeys(("wide_stride", "up_stride"), INT)
    angles = {"q_weight": x, "k_weight": x, "cos": FLOATS, "sin": FLOATS}
    counts = dict.fromkeys(("rows", "queries", "keys"), INT)
    for rank, up in ((16, x), (0, None)):
        sizes = {"RANK": rank, "RANKS": 16, "ROWS": 16, "EXACT": x == "*fp32"}
        given = {"wide": x, "up": up, **strides}
        columns = {"BLOCK": 128, **sizes}
        rows = {"rows": INT, "width": INT}
        sums = {"x": x, "weight": x, "y": x, "z": x, "eps": "fp32"}
        rounds = {**sizes, "num_warps": 8, "BLOCK": 512}
        yield "_norm_kernel", {**given, **sums, **rows}, rounds
        alone = {"RANK": rank, "RANKS": 16, "num_warps": 8, "BLOCK": 1024}
        yield "_alone_norm_kernel", {**given, **sums, "width": INT}, alone
        yield "_swiglu_kernel", {**given, "z": x, **rows}, columns
        parts = {"q": x, "k": x, "v": x, **angles, **counts, "eps": "fp32"}
        yield "_heads_kernel", {**given, **parts}, {**sizes, "HALF": 64, "LANES": 64}


def add_layer_norm(x):
    rows = dict.fromkeys(("x", "b", "weight", "bias", "y", "z"), x)
    yield "_kernel", {**rows, "width": INT, "eps": "fp32"}, {"BLOCK": 1024}


def rotate(x):
    tables = {"cos": FLOATS, "sin": FLOATS}
    strides = dict.fromkeys(("heads", "row_stride", "head_stride"), INT)
    for half, lanes in ((32, 32), (36, 64)):
        sizes = {"HALF": half, "LANES": lanes, "HEADS": 8}
        yield "_kernel", {"x": x, "out": x, **tables, **strides}, sizes


def recast(x):
    yield "_kernel", {"table": LONGS, "like": x}, {"VALUES": 1024}


def unpack(x):
    given = {"bytes": BYTES, "levels": FLOATS, "codes": FLOATS, "of": FLOATS, "offset": FLOATS}
    for coarse, scales in ((True, BYTES), (False, FLOATS)):
        sizes = {"BLOCK": 64, "WIDE": 256, "COARSE": coarse, "BYTES": 1024}
        yield "_nibble_kernel", {**given, "scales": scales, "out": x, "size": INT}, sizes
    yield (
        "_byte_kernel",
        {"weight": "*i8", "peaks": FLOATS, "out": x, "width": INT},
        {"BYTES": 1024},
    )


def heads(x):
    turn = {"q_weight": x, "k_weight": x, "cos": FLOATS, "sin": FLOATS}
    sizes = {"eps": "fp32", "queries": INT, "keys": INT}
    for half, lanes in ((64, 64), (40, 64)):
        constants = {"HALF": half, "LANES": lanes, "HEADS": 8}
        yield "_kernel", {"qkv": x, "q": x, "k": x, **turn, **sizes}, constants
        yield (
            "_backward_kernel",
            {"qkv": x, "dq": x, "dk": x, "dv": x, **turn, "dqkv": x, **sizes},
            constants,
        )


OPTIONS = ("num_warps", "num_stages")
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compiled(kernel, arguments, constants, capability):
    """The compiled kernel. `arguments`: types by name, None for an absent pointer."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    constants = {name: value for name, value in constants.items() if name not in OPTIONS}
    constants |= {name: None for name, kind in arguments.items() if kind is None}
    signature = {name: kind or "constexpr" for name, kind in arguments.items()} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(code, capability):
    """Registers, bytes spilled (stored and loaded), bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(code.asm["ptx"])
        name = f"sm_{capability}" + "a" * (capability == 90)
        command = [PTXAS, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "kernel")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", told)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", told)))
    return registers, spilled, code.metadata.shared


TOKENS = (token_logprob, sample, linear_logprob, decode_attention)
LAYERS = (swiglu, rms_norm, heads, merge_attention, up_gradient, raised)
OPS = (*TOKENS, *LAYERS, recast, add_layer_norm, rotate, unpack)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    dtype = f"*{sys.argv[2]}"
    for op in OPS:
        module = importlib.import_module(f"vise_kernels.{op.__name__}")
        for name, arguments, constants in op(dtype):
            code = compiled(getattr(module, name), arguments, constants, capability)
            print(op.__name__, name, *resources(code, capability), flush=True)
