"""How many threads a run takes, and how they wait: a busy machine is a normal machine.

    torch's pool   no more threads than there are cores for this process: what its affinity allows,
                   and what a container's CPU quota (cgroup v1 or v2) grants
    ours           vise_kernels start torch.get_num_threads() threads at most, and wait asleep
    waiting        OpenMP's threads fall asleep soon, sooner where other processes are at work when
                   a run begins; its own default is to spin

What a person says in the environment (OMP_NUM_THREADS, OMP_WAIT_POLICY, ...) stands. Nothing heavy
is imported: `wait_asleep` has to run before torch is loaded, `settle` is called once it is. Left
out: threads that decode images (`data.workers`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What torch reads a number of threads from."""

PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "6000"}
"""Sleep instead of spinning; libgomp, which torch's wheels ship, looks 6,000 times before it sleeps
(about 0.3 ms: the next operator has mostly come by then).
"""
HASTY = PATIENT | {"GOMP_SPINCOUNT": "2000"}
"""The same where others are at work: each look takes from them, or from the thread that is waited
for. No result depends on it. What either costs: docs/PERFORMANCE.md.
"""
LOOKS = 5
APART_S = 0.001
"""How often, and how far apart, it is looked who else is at work."""

HOW_TO_WAIT = (*PATIENT, "KMP_BLOCKTIME")
"""What a person may say of waiting; the last is of Intel's OpenMP."""


@dataclass(frozen=True)
class Cores:
    """What this process may use: `allowed` cores by affinity, and `quota`, the CPU time that
    cgroups grant it, in cores; None where nothing limits it.
    """

    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """Threads worth having: a quota of 1.5 is two, of 1.4 one, because the second thread adds
        less than half of what the first does where both are held for a third of the time.
        """
        if self.quota is None:
            return self.allowed
        return min(self.allowed, max(1, int(self.quota + 0.5)))

    def __str__(self) -> str:
        cores = f"{self.allowed} core{'s' if self.allowed > 1 else ''}"
        if self.quota is None or self.quota >= self.allowed:
            return f"{cores} allowed"
        return f"{cores} allowed, a CPU quota of {self.quota:.3g}"


@dataclass(frozen=True)
class Threads:
    """How many threads, and why."""

    count: int
    reason: str


def wait_asleep(
    environ: MutableMapping[str, str] = os.environ,
    loaded: Container[str] = sys.modules,
    root: Path = Path("/"),
) -> None:
    """Sets OpenMP's wait policy, unless the environment has one or torch (whose OpenMP reads it
    once) is loaded; `root`: where proc/ and sys/ lie.
    """
    if "torch" not in loaded and not said(environ):
        environ.update(HASTY if is_shared(root) else PATIENT)


def is_shared(root: Path = Path("/")) -> bool:
    """Whether other processes are at work right now on cores that this one would take."""
    free = (os.cpu_count() or 1) - usable_cores(root).usable
    for look in range(LOOKS):
        time.sleep(APART_S if look else 0)
        running = _running(root)
        if running is None or running - 1 <= free:  # one of them is this thread
            return False
    return True


def _running(root: Path) -> int | None:
    """Threads of the machine that run or wait for a core; None where nothing says so."""
    try:
        counts = (root / "proc/stat").read_text()
    except OSError:  # no Linux, or kept from us: nothing that a run needs
        return None
    found = [line for line in counts.splitlines() if line.startswith("procs_running ")]
    return int(found[0].split()[1]) if found else None


def said(environ: Mapping[str, str] = os.environ) -> str:
    """What the environment says of waiting: "OMP_WAIT_POLICY=PASSIVE"; "" where it says nothing."""
    return " ".join(f"{name}={environ[name]}" for name in HOW_TO_WAIT if name in environ)


def choose(
    torch_has: int, environ: Mapping[str, str] = os.environ, root: Path = Path("/")
) -> Threads:
    """What a run takes where torch alone would take `torch_has`: what the environment says, or no
    more than there are cores.
    """
    asked = next((name for name in COUNTS if name in environ), None)
    if asked is not None:
        return Threads(torch_has, f"{asked}={environ[asked]}")
    cores = usable_cores(root)
    return Threads(min(torch_has, cores.usable), str(cores))


def settle(say: Callable[[str], None]) -> None:
    """Gives torch's pool, and with it our kernels, the number of threads a run takes; says so where
    that is fewer than torch alone would take.
    """
    import torch

    torch_has = torch.get_num_threads()
    chosen = choose(torch_has)
    if chosen.count < torch_has:
        torch.set_num_threads(chosen.count)
        say(f"threads  {chosen.count} instead of {torch_has}: {chosen.reason}")


def usable_cores(root: Path = Path("/")) -> Cores:
    """Affinity and quota of this process; `root`: where proc/ and sys/ lie."""
    limits = [limit for group in _groups(root) if (limit := _limit(group)) is not None]
    return Cores(_allowed(), min(limits, default=None))


def _allowed() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the CPU groups this process is in, each followed by those above it, whose limits
    count as well.
    """
    listed = root / "proc/self/cgroup"
    if not listed.is_file():
        return
    for line in listed.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mounts = (".", "unified")
        elif "cpu" in controllers.split(","):
            mounts = (controllers, "cpu")
        else:
            continue
        for mount in mounts:
            yield from _upwards(root / "sys/fs/cgroup" / mount, PurePosixPath(path))


def _upwards(mount: Path, path: PurePosixPath) -> Iterator[Path]:
    """`mount`/path and all folders down to the mount. A container may see its group's path as the
    host names it and find its own limit at the mount: what is not there limits nothing.
    """
    names = [name for name in path.parts if name not in ("/", "..")]
    for length in range(len(names), -1, -1):
        yield mount.joinpath(*names[:length])


def _limit(group: Path) -> float | None:
    """CPU time over wall time that one group may use; None where it says "max" or -1, or
    nothing.
    """
    if (group / "cpu.max").is_file():
        quota, period = (group / "cpu.max").read_text().split()
    elif (group / "cpu.cfs_quota_us").is_file():
        quota = (group / "cpu.cfs_quota_us").read_text().strip()
        period = (group / "cpu.cfs_period_us").read_text().strip()
    else:
        return None
    return int(quota) / int(period) if quota.isdigit() else None
