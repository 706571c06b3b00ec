"""Checkpoints that outlive a kill at any point: written aside, synced, hashed, renamed into place;
verified before they are believed.

`<run>/checkpoints/step_N/` holds one safetensors file per group of tensors, state.json, any extra
files and manifest.json with the sha256 of each. Safetensors and JSON only. A right hash is not
believed either: names, sizes, shapes and numbers must be such as a save makes. Left out: what is
worth saving (method/learner.py, run/directory.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
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
NAME = re.compile(r"step_(\d+)(\.replaced)?", re.ASCII)
FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
LARGEST_TENSORS = 64 * 2**30
"""Bytes of the largest file of tensors that is read: the moments of rank 256 on 32 B parameters are
a quarter of it.
"""
LARGEST_MANIFEST = 2**20


class Corrupt(DataError):
    """A checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from (None: start anew), what was passed over, in words, and what
    could be fallen back to, newest first.
    """

    path: Path | None
    notes: list[str]
    older: tuple[Path, ...] = ()


def believe(path: Path) -> None:
    """A judge that has nothing against a checkpoint."""


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
        _check_step(path, state["step"])
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as fault:
        raise Corrupt(
            f"the checkpoint {path} is damaged: {' '.join(str(fault).split())[:200]}; use --resume "
            "auto to take an older one"
        ) from None
    return groups, state


def _check_step(path: Path, step: Any) -> None:
    """Raises ValueError for a step that is none, or not that of the name."""
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {str(step)[:40]}")
    if NAME.fullmatch(path.name) and step_of(path) != step:
        raise ValueError(f"it is of step {step}")


def choose(wanted: str, run_dir: str | Path, judge: Callable[[Path], None] = believe) -> Choice:
    """The checkpoint `wanted` means: 'auto' is the newest good one of the run (none yet: start
    anew), else a checkpoint or run directory. judge: raises Corrupt for what its caller cannot use.

    Raises ConfigError when there is nothing at that path, Corrupt when nothing there is whole.
    """
    if wanted == "auto":
        return _newest_good(Path(run_dir), judge)
    path = Path(wanted)
    if (path / "checkpoints").is_dir():
        return _newest_good(path, judge)
    if not path.is_dir():
        raise ConfigError(
            f"no checkpoint at {path}; give --resume an existing checkpoint directory, or auto"
        )
    _verify(path)
    judge(path)
    return Choice(path, [])


def latest(run_dir: str | Path) -> Path | None:
    """The newest good checkpoint of a run, or None."""
    return _newest_good(Path(run_dir)).path


def _newest_good(run_dir: Path, judge: Callable[[Path], None] = believe) -> Choice:
    notes: list[str] = []
    found = _candidates(run_dir / "checkpoints")
    for number, path in enumerate(found):
        try:
            _verify(path)
            judge(path)
        except Corrupt as fault:
            notes.append(str(fault).split(";")[0])
            continue
        return Choice(path, notes, tuple(found[number + 1 :]))
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
            data = files.read(path / name, entry["bytes"])
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
        manifest = json.loads(files.read(path / "manifest.json", LARGEST_MANIFEST))
    except OSError as fault:
        raise Corrupt(
            f"{path} is no whole checkpoint: manifest.json: {fault.strerror}; use --resume auto to "
            "take the newest good one"
        ) from None
    except (ValueError, RecursionError):
        raise _unreadable(path) from None
    try:
        known = manifest["format"] == FORMAT
        whole = type(manifest["step"]) is int and _complete(manifest["files"])
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(path) from None
    if not known:
        raise Corrupt(
            f"the checkpoint {path} has format {str(manifest['format'])[:40]}, this program reads "
            f"{FORMAT}; "
            "resume with the version that wrote it"
        )
    if not whole:
        raise Corrupt(
            f"the checkpoint {path} is damaged: manifest.json lists the wrong files; use --resume "
            "auto to take an older one"
        )
    return manifest


def _complete(entries: dict[str, dict[str, Any]]) -> bool:
    """Whether every entry has what is checked, in a size that can be, and lies in the checkpoint
    itself, state.json among them.
    """
    described = all(_described(name, entry) for name, entry in entries.items())
    return described and "state.json" in entries and all(map(FILE_NAME.fullmatch, entries))


def _described(name: str, entry: dict[str, Any]) -> bool:
    """Whether a manifest says of a file what is checked."""
    size = entry["bytes"]
    most = LARGEST_TENSORS if name.endswith(".safetensors") else files.LARGEST_JSON
    return type(size) is int and 0 <= size <= most and bool(SHA256.fullmatch(entry["sha256"]))


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
    """The inverse of `moments`. Raises Corrupt when the entries belong to other parameters, or
    cannot be theirs; nothing has changed then.
    """
    stored = _by_parameter(named, tensors, numbers)
    for name, found in stored.items():
        fault = _fault(optimizer, named[name], found)
        if fault:
            raise Corrupt(
                f"the checkpoint's optimizer state for {name} {fault}; use --resume auto to take "
                "an older one"
            )
    for name, found in stored.items():
        for key, value in found.items():
            # AdamW keeps its counter on the CPU
            on_device = isinstance(value, torch.Tensor) and key != "step"
            optimizer.state[named[name]][key] = value.to(named[name].device) if on_device else value


def _by_parameter(
    named: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """{parameter: {entry: value}}. Raises Corrupt for a parameter that is not there."""
    stored: dict[str, dict[str, Any]] = {}
    for entry, value in [*tensors.items(), *numbers.items()]:
        name, _, key = entry.rpartition("/")
        if name not in named:
            raise Corrupt(
                f"the checkpoint has optimizer state for {name}, which is not trained here; resume "
                "with the configuration that wrote it"
            )
        stored.setdefault(name, {})[key] = value
    return stored


ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
SMALL_8BIT = frozenset({"step", "state1", "state2"})
WHOLE_8BIT = SMALL_8BIT | {"qmap1", "qmap2", "absmax1", "absmax2"}
"""What AdamW keeps, and what bitsandbytes does for small parameters and for others."""
BLOCK = 256
"""Numbers that share a scale in the 8-bit moments, and codes of their map."""
LIKE_THE_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")


def _fault(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, found: Mapping[str, Any]
) -> str | None:
    """Why an optimizer could not go on with what was stored for a parameter. Native code trusts
    these shapes.
    """
    adam = isinstance(optimizer, torch.optim.AdamW)
    if found.keys() not in ([ADAM] if adam else [ADAM, SMALL_8BIT, WHOLE_8BIT]):
        return f"is not complete ({', '.join(sorted(found))[:80]})"
    if not _counts(found["step"]):
        return "has no number of steps"
    count = parameter.numel()
    sizes = {"qmap": (BLOCK,), "absmax": (math.ceil(count / BLOCK),)}
    for key in sorted(found.keys() - {"step"}):
        value = found[key]
        like = key in LIKE_THE_PARAMETER
        shape = tuple(parameter.shape) if like else sizes[key[:-1]]
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            return f"has another shape ({key})"
        if value.dtype != _width(key, parameter, found):
            return f"has another type ({key})"
        if not bool(value.isfinite().all()):
            return f"is not finite ({key})"
        if key == "exp_avg_sq" and bool((value < 0).any()):
            return f"is negative ({key})"
    return None


def _width(key: str, parameter: torch.nn.Parameter, found: Mapping[str, Any]) -> torch.dtype:
    """The dtype of an entry: 8-bit moments have a map beside them."""
    if key in ("exp_avg", "exp_avg_sq"):
        return parameter.dtype
    coded = key in LIKE_THE_PARAMETER and "qmap1" in found
    return torch.uint8 if coded else torch.float32


def _counts(step: Any) -> bool:
    """Whether it is a number of steps: a plain one, or a tensor of one number."""
    if isinstance(step, torch.Tensor):
        step = step.item() if step.numel() == 1 else None
    return isinstance(step, int | float) and 0 <= step < 2**53
