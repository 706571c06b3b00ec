"""The files that cannot be used, each with its reason."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from vise_fast.system import files

LOG = "bad_images.jsonl"


class BadFiles:
    """{name: reason}, and one line each in a JSON-lines file, where one is named.

    A line that an earlier run wrote there is not repeated.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.reasons: dict[str, str] = {}
        text = ""
        if path is not None:
            with contextlib.suppress(OSError):  # none yet, or not to be read: a line may come twice
                text = path.read_text(encoding="utf-8", errors="replace")
        self._written = set(text.splitlines())

    def add(self, name: str, reason: str) -> None:
        """Notes one file. Raises EnvironmentFault where the disk refuses."""
        self.reasons[name] = reason
        line = json.dumps({"name": name, "reason": reason})
        if self.path is None or line in self._written:
            return
        self._written.add(line)
        files.append(self.path, line.encode() + b"\n")

    @property
    def listed(self) -> str:
        """Where all of them can be read, as the end of a sentence."""
        return (
            "vise-fast data lists them" if self.path is None else f"they are listed in {self.path}"
        )

    def first(self) -> str:
        """The first file and its reason."""
        return described(*next(iter(self.reasons.items())))


def described(name: str, reason: str) -> str:
    """A file and its reason as printable text (names are bytes; some are no text)."""
    return f"{name.encode('utf-8', 'backslashreplace').decode('utf-8')} {reason}"
