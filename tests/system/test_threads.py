"""Threads: as many as affinity and cgroups grant, what the environment says stands, and OpenMP is
told to sleep before torch is loaded or not at all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vise_fast.system.machine import threads
from vise_fast.system.machine.threads import Cores, Threads

ROOT = Path(__file__).parents[2]
V2 = "0::/user.slice/run.scope\n"
V1 = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/docker/abc\n0::/\n"
MACHINES = {
    "no cgroups": ({}, None),
    "v2, no limit": (
        {"proc/self/cgroup": V2, "user.slice/run.scope/cpu.max": "max 100000\n"},
        None,
    ),
    "v2, own limit": (
        {"proc/self/cgroup": V2, "user.slice/run.scope/cpu.max": "150000 100000\n"},
        1.5,
    ),
    "v2, another period": (
        {"proc/self/cgroup": V2, "user.slice/run.scope/cpu.max": "20000 50000\n"},
        0.4,
    ),
    "v2, the group above is narrower": (
        {
            "proc/self/cgroup": V2,
            "user.slice/run.scope/cpu.max": "400000 100000\n",
            "user.slice/cpu.max": "200000 100000\n",
        },
        2.0,
    ),
    "v2, the group above has no limit": (
        {
            "proc/self/cgroup": V2,
            "user.slice/run.scope/cpu.max": "400000 100000\n",
            "user.slice/cpu.max": "max 100000\n",
        },
        4.0,
    ),
    "v2, a container that sees its limit at the mount": (
        {"proc/self/cgroup": "0::/../host/path\n", "cpu.max": "300000 100000\n"},
        3.0,
    ),
    "v2 beside v1": (
        {"proc/self/cgroup": "0::/run\n", "unified/run/cpu.max": "250000 100000\n"},
        2.5,
    ),
    "v1, no limit": (
        {
            "proc/self/cgroup": V1,
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "v1, own limit": (
        {
            "proc/self/cgroup": V1,
            "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "50000\n",
            "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "v1, a container that sees its limit at the mount": (
        {
            "proc/self/cgroup": V1,
            "cpu/cpu.cfs_quota_us": "700000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
        7.0,
    ),
    "v1, a limit that is of other controllers": (
        {
            "proc/self/cgroup": "4:cpuset:/abc\n3:cpuacct:/abc\n",
            "cpu/abc/cpu.cfs_quota_us": "50000\n",
            "cpu/abc/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
}


def invented(root: Path, files: dict[str, str]) -> Path:
    """A root that holds these files; what is not under proc/ lies in the cgroup mount."""
    for name, text in files.items():
        path = root / (name if name.startswith("proc/") else f"sys/fs/cgroup/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("name", MACHINES)
def test_the_quota_is_the_least_that_any_group_grants(tmp_path, monkeypatch, name):
    files, quota = MACHINES[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert threads.usable_cores(invented(tmp_path, files)) == Cores(8, quota)


@pytest.mark.parametrize(
    "allowed, quota, usable",
    [
        (8, None, 8),
        (1, None, 1),
        (8, 0.1, 1),
        (8, 1.0, 1),
        (8, 1.4, 1),
        (8, 1.5, 2),
        (8, 2.5, 3),
        (8, 7.9, 8),
        (2, 16.0, 2),
    ],
)
def test_a_fraction_is_a_thread_where_it_is_half_or_more(allowed, quota, usable):
    assert Cores(allowed, quota).usable == usable


def test_this_machine_has_a_core():
    assert 1 <= threads.usable_cores().usable <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_read_from_the_system():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from vise_fast.system.machine import threads; print(threads.usable_cores().allowed)"
    )
    assert fresh(code) == "1"


def test_no_more_threads_than_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    files = {"proc/self/cgroup": "0::/\n", "cpu.max": "250000 100000\n"}
    chosen = threads.choose(64, {}, invented(tmp_path, files))
    assert chosen == Threads(3, "64 cores allowed, a CPU quota of 2.5")


def test_torch_may_take_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert threads.choose(4, {}, tmp_path) == Threads(4, "8 cores allowed")


@pytest.mark.parametrize("name", threads.COUNTS)
def test_a_number_in_the_environment_stands(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert threads.choose(6, {name: "6"}, tmp_path) == Threads(6, f"{name}=6")


def test_a_run_is_told_only_what_changes(monkeypatch):
    import torch

    said, given = [], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(threads, "choose", lambda torch_has: Threads(12, "12 cores allowed"))
    threads.settle(said.append)
    assert said == given == []
    monkeypatch.setattr(threads, "choose", lambda torch_has: Threads(3, "3 cores allowed"))
    threads.settle(said.append)
    assert given == [3] and said == ["threads  3 instead of 12: 3 cores allowed"]


@pytest.mark.parametrize(
    "cores, usable, counts, shared",
    [
        (2, 2, [1], False),
        (2, 2, [2, 2, 2, 2, 2], True),
        (2, 2, [3, 9, 2, 2, 1], False),  # what was there for a moment only
        (8, 2, [7], False),
        (8, 2, [8, 8, 8, 8, 8], True),
        (2, 1, [2], False),
        (2, 2, [None], False),
        (None, 1, [2, 2, 2, 2, 2], True),
    ],
)
def test_others_at_work_make_waiting_shorter(tmp_path, monkeypatch, cores, usable, counts, shared):
    left = iter(counts)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(threads, "usable_cores", lambda root: Cores(usable, None))
    monkeypatch.setattr(threads, "_running", lambda root: next(left))
    monkeypatch.setattr(threads, "APART_S", 0)
    environ: dict[str, str] = {}
    threads.wait_asleep(environ, loaded=(), root=tmp_path)
    assert environ == (threads.HASTY if shared else threads.PATIENT)
    assert list(left) == [], "it looks as often as it has to"


@pytest.mark.parametrize(
    "text, count", [("cpu 1 2\nprocs_running 3\n", 3), ("cpu 1 2\n", None), (None, None)]
)
def test_who_runs_is_read_where_the_system_says_it(tmp_path, text, count):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/stat").write_text(text)
    assert threads._running(tmp_path) == count


def test_counts_that_are_kept_from_us_say_nothing(tmp_path):
    (tmp_path / "proc/stat").mkdir(parents=True)  # cannot be read, whoever asks
    assert threads._running(tmp_path) is None and not threads.is_shared(tmp_path)


def test_openmp_sleeps_unless_somebody_said_how_to_wait():
    environ = {"HOME": "/"}
    threads.wait_asleep(environ, loaded=())
    waiting = {name: value for name, value in environ.items() if name != "HOME"}
    assert waiting in (threads.PATIENT, threads.HASTY)
    for name in threads.HOW_TO_WAIT:
        environ = {name: "7"}
        threads.wait_asleep(environ, loaded=())
        assert environ == {name: "7"} and threads.said(environ) == f"{name}=7"


def test_nothing_is_set_once_torch_is_loaded():
    environ: dict[str, str] = {}
    threads.wait_asleep(environ, loaded=("torch",))
    assert environ == {} and threads.said(environ) == ""


def started(code: str, **environ: str) -> subprocess.CompletedProcess:
    """A fresh process that has no wait policy but the one given."""
    kept = {name: text for name, text in os.environ.items() if name not in threads.HOW_TO_WAIT}
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": path} | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def fresh(code: str, **environ: str) -> str:
    """What such a process prints."""
    return started(code, **environ).stdout.strip()


SAYS = "from vise_fast.system.machine import threads; print(threads.said())"


def test_the_package_sets_it_before_torch():
    loads = f"import sys, vise_fast; assert 'torch' not in sys.modules; {SAYS}"
    assert fresh(loads) in (threads.said(threads.PATIENT), threads.said(threads.HASTY))
    assert fresh(loads, OMP_WAIT_POLICY="ACTIVE") == "OMP_WAIT_POLICY=ACTIVE"


def test_the_package_leaves_it_where_torch_came_first():
    assert fresh(f"import torch, vise_fast; {SAYS}") == ""


def test_torch_reads_it():
    """libgomp shows what it read when it is loaded; other OpenMP libraries show it otherwise."""
    code = "import vise_fast, os; os.environ['OMP_DISPLAY_ENV'] = 'VERBOSE'; import torch"
    shown = started(code).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("this torch does not use libgomp")
    looks = (waiting["GOMP_SPINCOUNT"] for waiting in (threads.PATIENT, threads.HASTY))
    assert any(f"GOMP_SPINCOUNT = '{count}'" in shown for count in looks)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
