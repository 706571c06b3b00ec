"""The hashes of a folder's files: written when it is finished, checked before it is believed.

A folder without a manifest is somebody else's and is taken as it is. Model cards may be edited, so
they are not hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from vise_fast.system import files
from vise_fast.system.errors import EnvironmentFault

NAME = "manifest.json"
FORMAT = 1
NOT_HASHED = frozenset({NAME, "README.md"})


def write(directory: Path) -> None:
    """Hash every file of a folder, and let whoever may read this file read all of them (safetensors
    writes for the owner alone). Raises OSError.
    """
    entries = {path.name: entry(path) for path in _files(directory)}
    content = {"format": FORMAT, "files": entries}
    (directory / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in entries:
        path = directory / name
        if not path.is_symlink():
            path.chmod((directory / NAME).stat().st_mode)


def verify(directory: Path, what: str, needed: Collection[str] = ()) -> bool:
    """Whether the folder has a manifest, all of whose files are what they were, the `needed` ones
    among them.

    False: it has none. Raises EnvironmentFault, one line that names the file, where one differs;
    `what` says what the folder is.
    """
    path = directory / NAME
    if not os.path.lexists(path):
        return False
    entries = _entries(path, what)
    for name in sorted(set(needed) - entries.keys()):
        raise EnvironmentFault(
            f"{what} {directory} is damaged: {NAME} does not know {name}; copy the whole folder "
            f"again, or delete {NAME} to take it as it is"
        )
    for name, known in entries.items():
        file = directory / name
        if not file.is_file():
            raise EnvironmentFault(
                f"{what} {directory} is incomplete: {name} is missing; copy the whole folder again"
            )
        if file.stat().st_size != _size(known) or entry(file) != known:
            raise EnvironmentFault(
                f"{what} {directory} is damaged: {name} is not what was written; copy it again, or "
                f"delete {NAME} if you changed it on purpose"
            )
    return True


def entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _size(known: Any) -> Any:
    """What an entry says; None where it is none."""
    return known.get("bytes") if isinstance(known, dict) else None


def _files(directory: Path) -> Iterable[Path]:
    found = [path for path in directory.iterdir() if path.is_file()]
    return sorted(path for path in found if path.name not in NOT_HASHED)


def _entries(path: Path, what: str) -> dict[str, Any]:
    """{file name: entry} of a manifest; names that lead out of the folder are refused."""
    try:
        content = json.loads(files.read(path))
        entries = dict(content["files"])
        whole = content["format"] == FORMAT and all(Path(n).name == n for n in entries)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise EnvironmentFault(
            f"{what} {path.parent} is damaged: {NAME} cannot be read; copy the folder again, or "
            f"delete {NAME} to take it as it is"
        )
    return entries
