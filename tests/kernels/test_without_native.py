"""The kernels' own tests, for the image ops without boxes, on a copy of the package that has no
native module: plain paths pass, native ones say why they are skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FILES = ("test_patchify.py", "test_warp.py", "test_resize.py")


def test_the_plain_paths_pass_where_nothing_was_compiled(tmp_path):
    package = ROOT / "kernels" / "vise_kernels"
    left_out = shutil.ignore_patterns("_native*", "__pycache__")
    shutil.copytree(package, tmp_path / "vise_kernels", ignore=left_out)
    settings = tmp_path / "pytest.ini"
    settings.write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-c", str(settings)]
    command += ["-p", "no:cacheprovider", "-k", "not triton"]
    command += [str(HERE / name) for name in FILES]
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PYTHONSAFEPATH": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis"),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "the native module was not built" in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 50
