"""Rehearsed steps that were asked for before, one file each in the user's cache folder.

The name of a file is a hash of everything a rehearsal depends on: the question, the shapes of the
model, the versions of torch, transformers and peft, and this package's own source. What is damaged
is rehearsed again. Left out: pruning; a file is a kilobyte.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import vise_kernels

from vise_fast.config.places import PACKAGE
from vise_fast.estimate.rehearsal import Case, Phases, Rehearsed
from vise_fast.system import files
from vise_fast.system.errors import EnvironmentFault

LARGEST = 2**20
"""Bytes of the largest file that is read; a rehearsal is a thousandth."""


def place_of(case: Case, model_config: Any) -> Path:
    """The file of this question."""
    settings = case.config.model_dump(mode="json", exclude={"run", "memory"})
    plugins = [_read(path) for path in case.config.run.plugins]
    asked = [settings, case.sizes, str(case.dtype), case.lengths, case.device, plugins]
    words = json.dumps([asked, model_config.to_dict(), *_code()], sort_keys=True, default=str)
    return files.user_cache() / "plans" / f"{_digest(words)}.json"


@functools.cache
def _code() -> tuple[str, ...]:
    """Versions and this package's source: a rehearsal runs the code of a step."""
    versions = [metadata.version(name) for name in ("transformers", "peft")]
    source = hashlib.sha256()
    for root in (PACKAGE, Path(vise_kernels.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            source.update(path.read_bytes())
    return (torch.__version__, *versions, source.hexdigest())


def _read(path: str) -> str:
    """A hash of a file of the user's, which may bring a model family."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


def read(place: Path) -> Rehearsed | None:
    """What was found; None where nothing is there or it is not as written."""
    try:
        found = json.loads(files.read(place, LARGEST))
        phases = found["phases"]
        whole = found["sha256"] == _digest(json.dumps(phases))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Rehearsed(phases) if whole else None


def write(place: Path, rehearsed: Rehearsed) -> bool:
    """Put it in place, whole or not at all; whether it could be."""
    phases: Phases = rehearsed.phases
    try:
        files.write_json(place, {"phases": phases, "sha256": _digest(json.dumps(phases))})
    except EnvironmentFault:  # a full or read-only disk costs the next planner its seconds
        return False
    return True
