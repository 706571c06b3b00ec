"""What a wheel holds, with a compiler and without, that the one without works once installed, and
what the other ways to hand the package on hold.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = [
    "vise_fast",
    "kernels",
    "configs",
    "examples",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".gitignore",
]
BUILD = """
import sys
from scikit_build_core import build
getattr(build, "build_" + sys.argv[1])(sys.argv[2], {"cmake.build-type": "Debug"})
"""
NO_COMPILER = {"CXX": "/no/compiler"}

TRY_EVERY_OP = """
import torch, vise_kernels
from vise_kernels import ghost, linear_logprob, linear_logprob_kl, patchify
from vise_kernels import resize, sample, token_logprob, warp
assert vise_kernels.__file__.startswith(SITE), vise_kernels.__file__
paths = vise_kernels.available()
assert paths["ghost"][0] == "plain" or torch.cuda.is_available(), paths
image = torch.arange(48 * 64 * 3).view(48, 64, 3).to(torch.uint8)
box = torch.tensor([[4, 4, 40, 30]])
assert not torch.equal(ghost([image], [0], box)[0], image)
assert torch.equal(warp([image], torch.eye(3)[None])[0], image)
assert resize([image], [(32, 32)])[0].shape == (32, 32, 3)
assert patchify([image], patch=8, merge=2)[0].shape == (48, 384)
hidden = torch.randn(3, 8)
head = torch.randn(11, 8)
ids = torch.tensor([1, 5, 10])
logprob = token_logprob(hidden @ head.T, ids)[0]
assert torch.allclose(linear_logprob(hidden, head, ids), logprob, atol=1e-5)
assert torch.allclose(linear_logprob_kl(hidden, hidden, head, ids)[2], torch.zeros(3), atol=1e-5)
assert sample(hidden @ head.T, temperature=0.0, seed=ids, position=0)[0].shape == (3,)
"""

TRY_EVERY_FILE = """
import pathlib
from vise_fast.config import places, schema
from vise_fast.estimate import planner
from vise_fast.images import sources
from vise_fast.model import load
assert (pathlib.Path(places.PACKAGE) / "nano" / "model.safetensors").is_file()
assert str(places.CONFIGS).startswith(SITE), places.CONFIGS
for typed in ("configs/qwen3-vl-2b.yaml", "qwen3-vl-2b.yaml", "qwen3-vl-2b"):
    config = schema.load(typed, ["--train.steps", "7"])
    assert config.model.path == "Qwen/Qwen3-VL-2B-Instruct" and config.train.steps == 7
assert load.known_shapes(config.model.path).text_config.hidden_size == 2048
"""


def package(kind, folder, **environment):
    """What a copy of the source gives as `kind` (wheel, sdist, editable): (copy, file made)."""
    source, out = folder / "source", folder / kind
    source.mkdir()
    for name in NEEDED:
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, source / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = (path for path in out.iterdir() if path.suffix in (".whl", ".gz"))
    return source, made


def names_in(wheel):
    return zipfile.ZipFile(wheel).namelist()


def natives(names):
    return [name for name in names if "_native" in name and name.endswith((".so", ".pyd"))]


def test_the_kernels_folder_is_no_package():
    """It would shadow the Hugging Face package `kernels` and break transformers' models."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory):
    """The wheel that is made where there is no compiler."""
    return package("wheel", tmp_path_factory.mktemp("plain"), **NO_COMPILER)[1]


@pytest.fixture(scope="module")
def site(plain_wheel, tmp_path_factory):
    """A folder that the plain wheel was installed into."""
    folder = str(tmp_path_factory.mktemp("installed") / "site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--target", folder, str(plain_wheel)], capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_wheel_without_a_compiler_holds_both_packages_and_no_native_module(plain_wheel):
    names = names_in(plain_wheel)
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    assert not natives(names)  # also not the one that was built in place
    assert not [
        name
        for name in names
        if name.split("/")[0]
        not in ("vise_fast", "vise_kernels", plain_wheel.name.rsplit("-", 3)[0] + ".dist-info")
    ]
    for needed in (
        "vise_fast/nano/model.safetensors",
        "vise_fast/nano/tokenizer.json",
        "vise_fast/py.typed",
        "vise_kernels/py.typed",
        "vise_kernels/ghost.py",
    ):
        assert needed in names


def test_a_wheel_holds_every_preset_and_shape(plain_wheel):
    shipped = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert len(shipped) > 10
    expected = {f"vise_fast/{path.relative_to(ROOT)}" for path in shipped}
    assert expected == {n for n in names_in(plain_wheel) if n.startswith("vise_fast/configs/")}


def test_a_wheel_holds_the_examples_and_the_console_script(plain_wheel):
    names = names_in(plain_wheel)
    examples = {f"vise_fast/examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert len(examples) > 5 and examples <= set(names)
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    text = zipfile.ZipFile(plain_wheel).read(entry).decode()
    assert "vise-fast = vise_fast.__main__:run" in text.replace("=", " = ").replace("  ", " ")


def test_the_console_script_runs_from_anywhere(site, tmp_path):
    """As pip writes it: no checkout, no variable but the folder that was installed into."""
    words = [str(Path(site) / "bin" / "vise-fast"), "train", "--config", "qwen3-vl-2b", "--help"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={"PATH": os.defpath, "PYTHONPATH": site},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--train.steps 500" in done.stdout and "--train.lr 1e-06" in done.stdout


@pytest.mark.parametrize("script", [TRY_EVERY_OP, TRY_EVERY_FILE], ids=["ops", "files"])
def test_a_wheel_without_a_compiler_works_once_installed(script, site, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", script.replace("SITE", repr(site))],
        cwd=tmp_path,
        env={"PATH": os.defpath, "PYTHONPATH": site},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_editable_install_reads_the_checkout_and_nothing_beside_it(tmp_path):
    source, wheel = package("editable", tmp_path, **NO_COMPILER)
    assert not [name for name in names_in(wheel) if name.startswith("vise_fast/")]
    (pth,) = [name for name in names_in(wheel) if name.endswith(".pth")]
    text = zipfile.ZipFile(wheel).read(pth).decode()
    places = [line for line in text.splitlines() if not line.startswith("import ")]
    assert places == [str(source), str(source / "kernels")]


def test_a_source_archive_holds_what_a_wheel_is_made_from(tmp_path):
    _, archive = package("sdist", tmp_path)
    with tarfile.open(archive) as file:
        names = [name.partition("/")[2] for name in file.getnames()]
    assert "vise_fast/train.py" in names and "kernels/csrc/module.cpp" in names
    assert "examples/train_on_a_folder.py" in names
    assert "configs/qwen3-vl-2b.yaml" in names and "configs/models/qwen3-vl-2b.json" in names
    assert not natives(names)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="no compiler",
)
def test_a_wheel_with_a_compiler_holds_one_native_module(tmp_path):
    _, wheel = package("wheel", tmp_path)
    (native,) = natives(names_in(wheel))
    assert native.startswith("vise_kernels/")
    assert "none-any" not in wheel.name
