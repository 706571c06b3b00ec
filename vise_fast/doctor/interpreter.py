"""The interpreter: its version, system, text encoding and environment."""

from __future__ import annotations

import platform
import sys

from vise_fast.doctor.finding import Finding, fail, ok, warn

OLDEST = (3, 11)
UNTESTED = {
    "Darwin": (
        "only Linux is tested; here a run takes the CPU (mps is refused: nothing was ever checked "
        "on it), without Triton kernels"
    ),
    "Windows": (
        "only Linux is tested; here nothing keeps two processes out of one run's folder, planning "
        "needs --memory.budget_gb, and Triton kernels are not used; WSL2 is Linux"
    ),
}


def python() -> Finding:
    """Python is new enough."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST:
        return fail("python", found, "use Python 3.11 or newer")
    return ok("python", found)


def system() -> Finding:
    """Linux, which is what is tested."""
    found = f"{platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return warn("system", found, UNTESTED.get(platform.system(), "only Linux is tested"))
    return ok("system", found)


def encoding() -> Finding:
    """File names with accents can be written."""
    found = f"files {sys.getfilesystemencoding()}, output {sys.stdout.encoding}"
    if "utf" not in sys.getfilesystemencoding().lower():
        return warn(
            "text encoding",
            found,
            "set LANG=C.UTF-8, or file names with accents are shown as escapes",
        )
    return ok("text encoding", found)


def virtual_environment() -> Finding:
    """Not the system's own Python."""
    if sys.prefix == sys.base_prefix:
        return warn(
            "environment",
            f"the system's Python ({sys.prefix})",
            "use make train, or python3 -m venv .venv, to keep versions apart",
        )
    return ok("environment", sys.prefix)
