"""The native kernels written for vectors of any width, kept to what machines without AVX-512, and
without AVX2, would run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vise_kernels.dispatch import native

HERE = Path(__file__).parent
FILES = ("test_few_rows.py", "test_bank_attention.py", "test_ghost.py", "test_warp.py")


@pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
@pytest.mark.parametrize("lanes", [8, 4])
def test_the_kernels_pass_with_narrow_vectors(lanes):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton"]
    command += [str(HERE / name) for name in FILES]
    done = subprocess.run(
        command,
        cwd=HERE.parent.parent,
        env=os.environ | {"VISE_LANES": str(lanes)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
