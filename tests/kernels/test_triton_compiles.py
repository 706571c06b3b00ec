"""Every Triton kernel of the log-prob ops, of sampling and of decoding compiles for a GPU, whether
or not there is one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile them")
def test_the_kernels_of_tokens_compile(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(HERE.parent.parent / "kernels"),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    script = str(HERE / "compile_token_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * (3 + 4 + 5 + 2 + 2 + 4 + 4 + 2 + 2 + 1 + 6 + 1 + 2)
