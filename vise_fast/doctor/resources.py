"""Resources: cores, threads, memory, open files, and the disk of the run directory."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from vise_fast.doctor.finding import Finding, fail, ok, warn
from vise_fast.doctor.packages import imported
from vise_fast.system.machine.threads import choose, said, usable_cores


def cores() -> Finding:
    """More than one core is usable, by affinity and by CPU quota."""
    found = usable_cores()
    if found.usable == 1:
        return warn("cores", found, "the default run takes about twice as long on one core")
    return ok("cores", found)


def threads() -> Finding:
    """How many threads a run takes, why, and how they wait; no more than there are cores."""
    chosen = choose(imported("torch").get_num_threads())
    usable = usable_cores().usable
    waiting = said() or "as OpenMP does by itself"
    found = f"{chosen.count} ({chosen.reason}), waiting: {waiting}"
    if chosen.count > usable:
        advice = f"more than there are cores; start without, or with OMP_NUM_THREADS={usable}"
        return warn("threads", found, advice)
    return ok("threads", found)


def cpu_instructions() -> Finding:
    """The processor's vector instructions."""
    level = imported("torch").backends.cpu.get_cpu_capability()
    if level == "DEFAULT":
        return warn("CPU instructions", "no AVX2", "expect several times the stated run times")
    return ok("CPU instructions", level)


def memory() -> Finding:
    """What is available, not what is built in."""
    free = _available_memory() / 1e9
    found = f"{free:.1f} GB available"
    if free < 2:
        return warn("memory", found, "the embedded model needs about 2 GB; close something")
    return ok("memory", found)


def _available_memory() -> float:
    """Bytes that a new process can have."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    if available is None:
        raise ValueError(f"{meminfo} says nothing of MemAvailable")
    return int(available[1]) * 1e3


def ranks() -> Finding:
    """What several processes would exchange numbers by; no socket is opened."""
    torch = imported("torch")
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        advice = "one process trains all the same; for several, install torch's own wheel"
        return warn("several ranks", "this torch has no gloo", advice)
    gpus = torch.cuda.device_count()
    if gpus > 1 and not distributed.is_nccl_available():
        advice = "gradients would go through the host; install torch's own CUDA wheel"
        return warn("several ranks", f"{gpus} GPUs, and this torch has no NCCL", advice)
    lines = "NCCL and gloo" if distributed.is_nccl_available() else "gloo"
    started = os.environ.get("WORLD_SIZE")
    here = f"started as rank {os.environ.get('RANK')} of {started}" if started else "one process"
    return ok("several ranks", f"{lines}; {gpus} GPUs; {here}")


def open_files() -> Finding:
    """Enough files may be open at once."""
    try:
        import resource
    except ImportError:
        return ok("open files", "this system sets no limit of its own")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 256:
        return warn("open files", soft, "ulimit -n 1024")
    return ok("open files", soft)


def existing(path: Path) -> Path:
    """The nearest folder that is already there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disk(run_dir: Path) -> Finding:
    """Room for checkpoints."""
    free = shutil.disk_usage(existing(run_dir)).free / 1e9
    if free < 0.2:
        found = f"{free:.2f} GB free for {run_dir}"
        return fail("disk", found, "free space, or give --run.dir another disk")
    if free < 5:
        found = f"{free:.1f} GB free for {run_dir}"
        advice = (
            "enough for the embedded model; adapters of large models take about 1 GB a checkpoint"
        )
        return warn("disk", found, advice)
    return ok("disk", f"{free:.0f} GB free for {run_dir}")


def writable(run_dir: Path) -> Finding:
    """Writes, syncs and renames, as a checkpoint does; leaves nothing."""
    try:
        with tempfile.TemporaryDirectory(dir=existing(run_dir)) as folder:
            with open(Path(folder) / "a", "wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
            os.rename(Path(folder) / "a", Path(folder) / "b")
    except OSError as fault:
        found = f"{run_dir} cannot be written: {fault.strerror}"
        return fail("run directory", found, "give --run.dir a place of your own")
    return ok("run directory", f"{run_dir} can be written")
