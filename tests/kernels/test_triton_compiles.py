"""Every Triton kernel of the package compiles for every GPU generation from sm_80 to sm_90, whether
or not there is one, and fits: no register is spilled, no shared memory beyond what the smallest of
these cards has.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels" / "vise_kernels"

# a block's shared memory at most on sm_86 and sm_89 (CUDA C++ Programming Guide, table of compute
# capabilities): 99 KB
SHARED = 99 * 1024
TOKENS = 3 + 4 + 5 + 2 + 2 + 4 + 4 + 2 + 2 + 8 + 1 + 1 + 2 + 3
IMAGES = 5 + 1 + 1 + 3
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile them")


def lines_of(tmp_path, script, *words):
    """What a compiling script says, in a process where kernels are not interpreted."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(KERNELS.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def check_resources(lines, count):
    assert len(lines) == count
    for line in lines:
        op, name, registers, spilled, shared = line.split()
        assert int(registers) <= 255, line
        assert int(spilled) == 0, line
        assert int(shared) <= SHARED, line


@no_gpu
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_of_tokens_compile_and_fit(tmp_path, capability, dtype):
    lines = lines_of(tmp_path, "compile_token_kernels.py", str(capability), dtype)
    check_resources(lines, TOKENS)


@no_gpu
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_the_kernels_of_images_compile_and_fit(tmp_path, capability):
    check_resources(lines_of(tmp_path, "compile_image_kernels.py", str(capability)), IMAGES)


def launched(path):
    """The Triton kernels that a module launches, by name."""
    text = path.read_text()
    return {*re.findall(r"\blaunch\(\s*(_\w+)", text), *re.findall(r"\b(_\w*kernel)\[", text)}


def test_no_kernel_is_left_out(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(HERE))
    tokens = importlib.import_module("compile_token_kernels")
    images = importlib.import_module("compile_image_kernels")
    named = {}
    for op in tokens.OPS:
        named[op.__name__] = {name for name, *_ in op("*bf16")}
    for op in images.OPS:
        module = importlib.import_module(f"vise_kernels.{op.__name__}")
        named[op.__name__] = {name for name, *_ in op(module)}
    found = {path.stem: launched(path) for path in KERNELS.glob("*.py")}
    assert named == {op: names for op, names in found.items() if names}
