"""What a wheel holds, with a compiler and without, and that the one without works once installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = [
    "vise_fast",
    "kernels",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".gitignore",
]
BUILD = "import sys; from scikit_build_core.build import build_wheel; build_wheel(sys.argv[1], {'cmake.build-type': 'Debug'})"

TRY_EVERY_OP = """
import torch, vise_kernels
from vise_kernels import ghost, linear_logprob, linear_logprob_kl, patchify, resize, sample, token_logprob, warp
assert vise_kernels.__file__.startswith(SITE), vise_kernels.__file__
paths = vise_kernels.available()
assert paths["ghost"][0] == "plain" or torch.cuda.is_available(), paths
image, box = torch.arange(48 * 64 * 3).view(48, 64, 3).to(torch.uint8), torch.tensor([[4, 4, 40, 30]])
assert not torch.equal(ghost([image], [0], box)[0], image)
assert torch.equal(warp([image], torch.eye(3)[None])[0], image)
assert resize([image], [(32, 32)])[0].shape == (32, 32, 3)
assert patchify([image], patch=8, merge=2)[0].shape == (48, 384)
hidden, head, ids = torch.randn(3, 8), torch.randn(11, 8), torch.tensor([1, 5, 10])
logprob = token_logprob(hidden @ head.T, ids)[0]
assert torch.allclose(linear_logprob(hidden, head, ids), logprob, atol=1e-5)
assert torch.allclose(linear_logprob_kl(hidden, hidden, head, ids)[2], torch.zeros(3), atol=1e-5)
assert sample(hidden @ head.T, temperature=0.0, seed=ids, position=0)[0].shape == (3,)
import vise_fast.config, vise_fast.images, pathlib
assert (pathlib.Path(vise_fast.__file__).parent / "nano" / "model.safetensors").is_file()
"""


def make_wheel(folder, **environment):
    """The one wheel that a copy of the source gives, as (path, names inside)."""
    source, out = folder / "source", folder / "wheel"
    source.mkdir()
    for name in NEEDED:
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, source / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = out.glob("*.whl")
    return wheel, zipfile.ZipFile(wheel).namelist()


def natives(names):
    return [name for name in names if "_native" in name and name.endswith((".so", ".pyd"))]


def test_the_kernels_folder_is_no_package():
    """It would shadow the Hugging Face package `kernels` and break the import of transformers' models."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_wheel_without_a_compiler_installs_and_works(tmp_path):
    wheel, names = make_wheel(tmp_path, CXX="/no/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not natives(names)  # also not the one that was built in place
    assert not [
        name
        for name in names
        if name.split("/")[0]
        not in ("vise_fast", "vise_kernels", wheel.name.rsplit("-", 3)[0] + ".dist-info")
    ]
    for needed in (
        "vise_fast/nano/model.safetensors",
        "vise_fast/nano/tokenizer.json",
        "vise_kernels/ghost.py",
    ):
        assert needed in names
    site = str(tmp_path / "site")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        str(wheel),
    ]
    assert subprocess.run(install, capture_output=True, text=True).returncode == 0
    script = TRY_EVERY_OP.replace("SITE", repr(site))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": site},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="no compiler",
)
def test_a_wheel_with_a_compiler_holds_one_native_module(tmp_path):
    wheel, names = make_wheel(tmp_path)
    assert len(natives(names)) == 1 and natives(names)[0].startswith("vise_kernels/")
    assert "none-any" not in wheel.name
