"""The kernels' own tests against a native module that watches every access to memory and every
operation that C++ leaves undefined.

    python tests/kernels/sanitize.py            compile and run, with vectors of each width
    python tests/kernels/sanitize.py -k ghost   words for pytest

Builds with AddressSanitizer and UndefinedBehaviorSanitizer under build/sanitize, beside a copy of
the package, and loads the former before Python. A finding ends the run and is printed. Left out:
leaks (Python and PyTorch keep what they hold until the end), Triton, and what a test does in a
process of its own. Needs GCC or Clang with both sanitizers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from vise_kernels.build import PACKAGE, ROOT, build

TESTS = ROOT / "tests" / "kernels"
WHERE = ROOT / "build" / "sanitize"
COPY = WHERE / "package"
REPORT = WHERE / "report"
FLAGS = (
    "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow "
    "-fno-sanitize-recover=all"
)
SETTINGS = f"""[pytest]
pythonpath = {ROOT / "tests"}
addopts = --strict-markers -p no:cacheprovider -q
markers =
    gpu
    slow
"""
LEFT_OUT = (
    "test_triton_compiles.py",
    "test_image_kernels_compile.py",
    "test_narrow_lanes.py",
    "test_without_native.py",
    "test_no_sync.py",
)
# does_not_give: in a process of its own. shape5: watched loops are not vectorised, and a sum of
# 2048 floats one after the other is less exact than one in lanes. rounds_as: nor are their products
# fused as the release's are.
WORDS = (
    "not triton and not gpu and not does_not_give and not shape5-dtype0-native and not rounds_as"
)
LANES = {16: (), 8: ("few_rows", "bank_attention", "ghost", "warp"), 4: ("few_rows", "warp")}


def compiled() -> None:
    """The package with its watched module, under COPY."""
    options = ["-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    build(options, WHERE, COPY)
    for source in PACKAGE.glob("*.py"):
        shutil.copy(source, COPY / "vise_kernels")
    (WHERE / "pytest.ini").write_text(SETTINGS)


def refuse_another() -> None:
    """The tests must run what was compiled here, and not what lies in the checkout."""
    code = "from vise_kernels import dispatch; print(dispatch.native().__file__)"
    told = watched(["-c", code], capture_output=True)
    if not Path(told.stdout.strip()).is_relative_to(COPY):
        raise SystemExit(f"the tests would run {told.stdout or told.stderr}")


def runtime() -> str:
    """The libraries that have to be there before all others: the watching allocator, and what C++
    throws with, which Python itself does not load.
    """
    watch = found("libasan.so") or found("libclang_rt.asan-x86_64.so")
    throw = found("libstdc++.so.6") or found("libstdc++.so")
    if watch is None or throw is None:
        raise SystemExit("the compiler has no AddressSanitizer beside it; install its sanitizers")
    return f"{watch} {throw}"


def found(name: str) -> str | None:
    """Where the compiler looks for a library."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return told if Path(told).is_file() else None


def watched(words: list[str], lanes: int = 16, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with the watched module, and vectors of so many floats at most."""
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": f"log_path={REPORT}:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": f"log_path={REPORT}:print_stacktrace=1",
        "PYTHONPATH": str(COPY),
        "PYTHONSAFEPATH": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(WHERE / "hypothesis"),
        "OMP_NUM_THREADS": "1",
        "VISE_LANES": str(lanes),
    }
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=WHERE, env=environment, text=True, **options)


def tested(lanes: int, files: list[str], words: list[str]) -> int:
    """pytest's exit status."""
    print(f"== vectors of {lanes} floats", flush=True)
    pytest = ["-m", "pytest", "-c", str(WHERE / "pytest.ini"), "-k", WORDS]
    return watched([*pytest, *files, *words], lanes).returncode


def main(words: list[str]) -> None:
    """Exit status 1: a test failed or a sanitizer found something."""
    compiled()
    refuse_another()
    for old in WHERE.glob("report.*"):
        old.unlink()
    failed = False
    for lanes, names in LANES.items():
        files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if path.name not in LEFT_OUT]
        if names:
            files = [str(TESTS / f"test_{name}.py") for name in names]
        failed |= tested(lanes, files, words) != 0
    for report in WHERE.glob("report.*"):
        failed = True
        print(report.read_text())
    sys.exit(int(failed))


if __name__ == "__main__":
    main(sys.argv[1:])
