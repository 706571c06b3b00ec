"""Every Triton kernel of the log-prob ops, of sampling, of decoding and of the layers compiles for
every GPU generation from sm_80 to sm_90, whether or not there is one, and fits: no register is
spilled, no shared memory beyond what the smallest of these cards has.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


# a block's shared memory at most on sm_86 and sm_89 (CUDA C++ Programming Guide, table of compute
# capabilities): 99 KB
SHARED = 99 * 1024
KERNELS = 3 + 4 + 5 + 2 + 2 + 4 + 4 + 2 + 2 + 6 + 1 + 1 + 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile them")
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_of_tokens_compile_and_fit(tmp_path, capability, dtype):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(HERE.parent.parent / "kernels"),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, str(HERE / "compile_token_kernels.py"), str(capability), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == KERNELS
    for line in lines:
        op, name, registers, spilled, shared = line.split()
        assert int(registers) <= 255, line
        assert int(spilled) == 0, line
        assert int(shared) <= SHARED, line
