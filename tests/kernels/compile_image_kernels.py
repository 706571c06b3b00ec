"""Compiles the Triton kernels of the image ops to machine code for two GPU generations; needs no
GPU.

Run by test_image_kernels_compile.py in a process of its own, because interpreted kernels cannot be
compiled. One line per kernel.
"""

import importlib

from compile_token_kernels import compiled

TABLE = {"table": "*i64"}


def ghost(module):
    sizes = {"COLUMNS": module.COLUMNS, "TILE": module.TILE, "STRETCH": module.STRETCH}
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


if __name__ == "__main__":
    for op in (ghost, warp, resize, patchify):
        module = importlib.import_module(f"vise_kernels.{op.__name__}")
        for capability in (80, 90):
            for name, arguments, constants in op(module):
                code = compiled(getattr(module, name), arguments, constants, capability).asm[
                    "cubin"
                ]
                print(op.__name__, name, f"sm_{capability}", len(code), "bytes")
