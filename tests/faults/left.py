"""What a run left behind, as far as it must not depend on what happened to it on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from small_runs import CHANGING, lines

from vise_fast.config import schema
from vise_fast.system import checkpoint, manifest

HASHED = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class Left:
    """Names of all files; bytes of the adapter, the last checkpoint and the pictures; what the
    lines say (times aside), and the evaluation.
    """

    names: set[str]
    contents: dict[str, bytes]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: Any


def left(directory: Path) -> Left:
    """Read from a run's folder."""
    files = {str(path.relative_to(directory)): path for path in _files(directory)}
    same = {name: path.read_bytes() for name, path in files.items() if _is_the_same(path)}
    return Left(
        set(files) - {".lock"},
        same,
        [_without_times(record) for record in lines(directory / "metrics.jsonl")],
        lines(directory / "samples.jsonl"),
        json.loads((directory / "evaluation.json").read_text()),
    )


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _is_the_same(path: Path) -> bool:
    """Whether a file's bytes are those of an undisturbed run (a configuration names its folder, and
    how it was resumed).
    """
    return path.parent.name in ("adapter", "samples", "plots") or path.name in HASHED


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CHANGING}


def sound(directory: Path) -> None:
    """At no moment is something half: what has its final name is whole."""
    adapter = directory / "adapter"
    assert not adapter.exists() or manifest.verify(adapter, "the adapter")
    choice = checkpoint.choose("auto", directory)
    assert not choice.notes, choice.notes
    for name in ("run.json", "env.json", "evaluation.json"):
        if (directory / name).exists():
            json.loads((directory / name).read_text())
    if (directory / "config.yaml").exists():
        schema.load(directory / "config.yaml")
    if (directory / "report.html").exists():
        assert "</html>" in (directory / "report.html").read_text()


def steps_saved(directory: Path) -> int:
    """The step of the newest checkpoint, -1 where there is none."""
    newest = checkpoint.latest(directory)
    return -1 if newest is None else checkpoint.step_of(newest)
