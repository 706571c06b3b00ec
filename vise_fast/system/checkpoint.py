"""Checkpoints that outlive a kill at any point: written aside, synced, hashed, renamed into place;
verified before they are believed.

`<run>/checkpoints/step_N/` holds one safetensors file per group of tensors, state.json, any extra
files and manifest.json with the sha256 of each. Safetensors and JSON only. Left out: what is worth
saving (method/learner.py, run/directory.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from vise_fast.system import files
from vise_fast.system.errors import ConfigError, DataError

Tensors = dict[str, dict[str, torch.Tensor]]
FORMAT = 1
CONFIG = "config.yaml"
"""A checkpoint's copy of the configuration it was made with."""
# a step that is written again keeps its old self under the second name until the new one is in
# place
NAME = re.compile(r"step_(\d+)(\.replaced)?")


class Corrupt(DataError):
    """A checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from (None: start anew) and what was passed over, in words."""

    path: Path | None
    notes: list[str]


def save(
    run_dir: str | Path,
    step: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    keep: int,
    copies: Mapping[str, Path] | None = None,
) -> Path:
    """Writes step `step` durably, then removes all but the newest `keep` and any later step (a
    future that a resume left); returns its directory.

    tensors: {group: {name: tensor}}, on any device; state: anything JSON holds; copies: {name in
    the checkpoint: file to copy}. Raises EnvironmentFault when the disk refuses; what was there
    stays good.
    """
    home = Path(run_dir) / "checkpoints"
    final = home / f"step_{step}"
    aside = home / f".step_{step}.partial"
    with files.refused(f"the checkpoint {final}"):
        try:
            home.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(home)
            aside.mkdir()
            _write_all(aside, step, tensors, state, copies or {})
            _put_in_place(aside, final)
            _prune(home, step, keep)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return final


def load(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """({group: {name: tensor on the CPU}}, state) of a checkpoint whose every byte matches its
    manifest. Raises Corrupt.
    """
    path = Path(path)
    contents = dict(_verified(path))
    try:
        state = json.loads(contents["state.json"])
        groups = {
            name.removesuffix(".safetensors"): safetensors.torch.load(data)
            for name, data in contents.items()
            if name.endswith(".safetensors")
        }
    except (KeyError, ValueError, SafetensorError) as fault:
        raise Corrupt(
            f"the checkpoint {path} is damaged: {fault}; use --resume auto to take an older one"
        ) from None
    return groups, state


def choose(wanted: str, run_dir: str | Path) -> Choice:
    """The checkpoint `wanted` means: 'auto' is the newest good one of the run (none yet: start
    anew), else a checkpoint or run directory.

    Raises ConfigError when there is nothing at that path, Corrupt when nothing there is whole.
    """
    if wanted == "auto":
        return _newest_good(Path(run_dir))
    path = Path(wanted)
    if (path / "checkpoints").is_dir():
        return _newest_good(path)
    if not path.is_dir():
        raise ConfigError(
            f"no checkpoint at {path}; give --resume an existing checkpoint directory, or auto"
        )
    _verify(path)
    return Choice(path, [])


def latest(run_dir: str | Path) -> Path | None:
    """The newest good checkpoint of a run, or None."""
    return _newest_good(Path(run_dir)).path


def _newest_good(run_dir: Path) -> Choice:
    notes: list[str] = []
    for path in _candidates(run_dir / "checkpoints"):
        try:
            _verify(path)
        except Corrupt as fault:
            notes.append(str(fault).split(";")[0])
            continue
        return Choice(path, notes)
    if notes:
        raise Corrupt(
            f"no checkpoint under {run_dir} is whole ({notes[0]}); delete "
            f"{run_dir / 'checkpoints'} to start anew"
        )
    return Choice(None, [])


def _candidates(home: Path) -> list[Path]:
    """Checkpoint directories, newest step first, a replaced one after its replacement."""
    found = [path for path in home.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.name.removesuffix(".replaced").removeprefix("step_"))


# -- writing ---------------------------------------------------------------------------------------


def _write_all(
    aside: Path, step: int, tensors: Tensors, state: Mapping[str, Any], copies: Mapping[str, Path]
) -> None:
    """Everything, each file synced, the manifest last, then the directory itself."""
    entries = {}
    for group, named in tensors.items():
        name = f"{group}.safetensors"
        entries[name] = _write(aside / name, _packed(named))
    for name, source in copies.items():
        entries[name] = _write(aside / name, source.read_bytes())
    entries["state.json"] = _write(aside / "state.json", _json({**state, "step": step}))
    _write(aside / "manifest.json", _json({"format": FORMAT, "step": step, "files": entries}))
    files.sync(aside)


def _packed(named: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()}
    )


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Writes and syncs one file; returns its entry in the manifest."""
    files.write_synced(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _put_in_place(aside: Path, final: Path) -> None:
    """Renames into place. There is no moment without a good checkpoint: an old one of the same step
    steps aside first.
    """
    replaced = final.with_name(final.name + ".replaced")
    if final.exists() and replaced.exists():
        _remove(final)
    elif final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    files.sync(final.parent)
    if replaced.exists():
        _remove(replaced)


def _prune(home: Path, step: int, keep: int) -> None:
    """After a durable save: removes what a kill left replaced, steps of an abandoned future, and
    all but the newest `keep`.
    """
    found = _candidates(home)
    replaced = [path for path in found if path.suffix and path.with_suffix("") in found]
    spent = [path for path in found if step_of(path) > step or path in replaced]
    rest = [path for path in found if path not in spent]
    for path in spent + rest[keep:]:
        _remove(path)


def _remove(path: Path) -> None:
    """In one rename a checkpoint stops being one; a removal cut short is finished by the next
    save.
    """
    gone = path.with_name(f".{path.name}.removed")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _clear_leftovers(home: Path) -> None:
    """What a killed process left half-written or half-removed."""
    for path in [*home.glob(".step_*.partial"), *home.glob(".step_*.removed")]:
        shutil.rmtree(path)


# -- reading ---------------------------------------------------------------------------------------


def _verify(path: Path) -> None:
    """Raises Corrupt. One file at a time is in memory."""
    for _ in _verified(path):
        pass


def _verified(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file of the manifest, each checked by size and sha256.

    Raises Corrupt.
    """
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        try:
            data = (path / name).read_bytes()
        except OSError as fault:
            raise Corrupt(
                f"the checkpoint {path} is damaged: {name}: {fault.strerror}; use --resume auto to "
                "take an older one"
            ) from None
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Corrupt(
                f"the checkpoint {path} is damaged: {name} is not what was written; use --resume "
                "auto to take an older one"
            )
        yield name, data


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint of this format, with all its entries. Raises Corrupt."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except OSError as fault:
        raise Corrupt(
            f"{path} is no whole checkpoint: manifest.json: {fault.strerror}; use --resume auto to "
            "take the newest good one"
        ) from None
    except ValueError:
        raise _unreadable(path) from None
    try:
        known = manifest["format"] == FORMAT
        whole = isinstance(manifest["step"], int) and _complete(manifest["files"])
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(path) from None
    if not known:
        raise Corrupt(
            f"the checkpoint {path} has format {manifest['format']}, this program reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    if not whole:
        raise Corrupt(
            f"the checkpoint {path} is damaged: manifest.json lists the wrong files; use --resume "
            "auto to take an older one"
        )
    return manifest


def _complete(entries: dict[str, dict[str, Any]]) -> bool:
    """Whether every entry has what is checked and lies in the checkpoint itself, state.json among
    them.
    """
    described = all({"bytes", "sha256"} <= entry.keys() for entry in entries.values())
    return described and "state.json" in entries and all(Path(n).name == n for n in entries)


def _unreadable(path: Path) -> Corrupt:
    return Corrupt(
        f"the checkpoint {path} is damaged: manifest.json cannot be read; use --resume auto to "
        "take an older one"
    )


# -- optimizer state -------------------------------------------------------------------------------


def moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state per parameter as ({'name/exp_avg': tensor}, {'name/step': number}),
    ready for `save`.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def restore_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """The inverse of `moments`. Raises Corrupt when the entries belong to other parameters."""
    for entry, value in [*tensors.items(), *numbers.items()]:
        name, _, key = entry.rpartition("/")
        if name not in named:
            raise Corrupt(
                f"the checkpoint has optimizer state for {name}, which is not trained here; resume "
                "with the configuration that wrote it"
            )
        # AdamW keeps its counter on the CPU
        on_device = isinstance(value, torch.Tensor) and key != "step"
        optimizer.state[named[name]][key] = value.to(named[name].device) if on_device else value
