"""Compiles the native module in place, for a plain checkout.

    python -m vise_kernels.build [-DVISE_NATIVE_ARCH=ON]

Runs CMake on the checkout's CMakeLists.txt with this Python's nanobind and puts `_native*.so`
beside this file; a second run compiles only what changed. Arguments are handed to CMake. An
installed package has no need of it.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent.parent
WHERE = ROOT / "build" / f"native-{sys.implementation.cache_tag}"


def find_tool(name: str) -> str | None:
    """The program `name` from this Python's environment, else from the search path."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def build(options: list[str], where: Path = WHERE, prefix: Path = PACKAGE.parent) -> None:
    """Configures, compiles in `where` and installs into `prefix`/vise_kernels. RuntimeError: no
    CMake, no checkout; CalledProcessError: the build failed.
    """
    cmake = find_tool("cmake")
    if cmake is None:
        raise RuntimeError(
            "no cmake; the native module is compiled with it; pip install cmake ninja nanobind"
        )
    if not (ROOT / "CMakeLists.txt").is_file():
        raise RuntimeError(f"no CMakeLists.txt in {ROOT}; only a checkout is built in place")
    place = str(where)
    python = f"-DPython_EXECUTABLE={sys.executable}"
    configure = [cmake, "-S", str(ROOT), "-B", place, *_ninja(), python, *options]
    install = [cmake, "--install", place, "--prefix", str(prefix)]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", place], check=True)
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)


def _ninja() -> list[str]:
    """CMake's words for Ninja, where it is installed."""
    ninja = find_tool("ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


if __name__ == "__main__":
    build(sys.argv[1:])
