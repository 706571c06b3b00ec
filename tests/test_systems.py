"""Systems that lack what Linux has (Windows, macOS), and a machine without matplotlib: a run trains
there all the same. Their words are taken away in a process of its own, once the libraries, which
have words for each system, are there; nothing else of those systems is tested.
"""

import os
import subprocess
import sys
from pathlib import Path

from vise_fast.doctor import interpreter
from vise_fast.estimate import planner
from vise_fast.system.machine import clock

ROOT = Path(__file__).parents[1]
TAKEN_AWAY = """
import os, signal, sys
import peft, PIL.Image, rich.progress, torch, transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer
for name in ("resource", "fcntl", "matplotlib"):
    sys.modules[name] = None
for name in ("O_NONBLOCK", "O_CLOEXEC", "sched_getaffinity", "sysconf"):
    delattr(os, name)
del signal.SIGHUP
from vise_fast import train
from vise_fast.system import console
sys.exit(console.run(train.main, sys.argv[1:]))
"""
SMALL = [
    "--train.steps=1",
    "--train.batch=2",
    "--rollout.samples=2",
    "--rollout.views=1",
    "--eval.scenes=2",
]


def test_a_run_needs_none_of_what_other_systems_lack(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TAKEN_AWAY, *SMALL, "--run.dir=run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "without locks" in done.stderr and "pip install matplotlib" in done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert "mean IoU" in (tmp_path / "run" / "report.html").read_text()
    opening = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("run  ", "model  ", "data  ", "device  ", "kernel  "))
    ]
    assert [line.split()[0] for line in opening] == ["run", "model", "data", "device"]
    assert max(map(len, opening)) <= 80 and "--verbose" in opening[-1]
    assert "Traceback" not in done.stderr and "FutureWarning" not in done.stderr


def test_a_system_that_tells_no_memory_asks_for_a_budget(monkeypatch):
    from vise_fast.config.schema import load
    from vise_fast.system.errors import EnvironmentFault

    monkeypatch.delattr(os, "sysconf")
    assert planner.usable(load(None, ["--memory.budget_gb=4"])) > 3e9
    try:
        planner.usable(load())
    except EnvironmentFault as fault:
        assert "--memory.budget_gb" in str(fault)
    else:
        raise AssertionError("planned for an unknown memory")


def test_a_system_that_tells_no_peak_says_nothing_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(clock.Path, "exists", lambda path: False)
    assert clock.peak_memory("cpu") == 0


def test_the_doctor_says_what_is_untested_elsewhere(monkeypatch):
    for system, word in (("Darwin", "mps"), ("Windows", "WSL2"), ("Plan9", "only Linux")):
        monkeypatch.setattr(interpreter.platform, "system", lambda system=system: system)
        found = interpreter.system()
        assert found.status == "WARN" and word in found.fix
