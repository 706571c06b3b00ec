"""Compiles the Triton kernels of the image ops to machine code for one GPU generation; needs no
GPU.

    python compile_image_kernels.py 86

Run by test_triton_compiles.py in a process of its own, because interpreted kernels cannot be
compiled. A line per kernel, as compile_token_kernels.py's.
"""

import importlib
import sys

from compile_token_kernels import compiled, resources

TABLE = {"table": "*i64"}


def ghost(module):
    sizes = {"COLUMNS": module.COLUMNS, "TILE": module.TILE, "STRETCH": module.STRETCH}
    sizes["num_warps"] = module.WARPS
    yield "_across_kernel", TABLE, sizes
    for outside in (False, True):
        yield "_down_kernel", {**TABLE, "feather": "fp32"}, {**sizes, "OUTSIDE": outside}
        cells = {
            "COLUMNS": module.COLUMNS,
            "PIXELS": module.PIXELS,
            "HOLE": outside,
            "OUTSIDE": outside,
        }
        yield "_cells_kernel", {**TABLE, "feather": "fp32"}, cells


def warp(module):
    yield (
        "_warp_kernel",
        {**TABLE, "inverses": "*fp32", "fill": "fp32"},
        {"COLUMNS": module.COLUMNS, "PIXELS": module.PIXELS},
    )


def resize(module):
    yield "_axis_kernel", TABLE, {"COLUMNS": module.COLUMNS, "VALUES": module.VALUES}


def patchify(module):
    for value, taps in (("*bf16", 1), ("*fp32", 2)):
        sizes = {
            "COLUMNS": module.COLUMNS,
            "VALUES": module.VALUES,
            "PATCH": 16,
            "MERGE": 2,
            "TAPS": taps,
        }
        yield "_patchify_kernel", {**TABLE, "levels": value, "out": value}, sizes
    sizes = {"COLUMNS": module.COLUMNS, "PIXELS": module.PIXELS, "PATCH": 16, "MERGE": 2, "TAPS": 1}
    yield (
        "_warped_kernel",
        {**TABLE, "levels": "*bf16", "out": "*bf16", "inverses": "*fp32", "fill": "fp32"},
        sizes,
    )


OPS = (ghost, warp, resize, patchify)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for op in OPS:
        module = importlib.import_module(f"vise_kernels.{op.__name__}")
        for name, arguments, constants in op(module):
            code = compiled(getattr(module, name), arguments, constants, capability)
            if name == "_down_kernel":
                assert "ld.global.b16" not in code.asm["ptx"], "no vectors: one half at a time"
            print(op.__name__, name, *resources(code, capability), flush=True)
