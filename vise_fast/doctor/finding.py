"""What a check says: one finding, OK, WARN (it runs, but slower or with less) or FAIL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`status`: OK, WARN or FAIL; `found`: what is there; `fix`: what to do, unless it is OK."""

    name: str
    status: str
    found: str
    fix: str = ""


def ok(name: str, found: object) -> Finding:
    """Nothing to do."""
    return Finding(name, "OK", str(found))


def warn(name: str, found: object, fix: str) -> Finding:
    """It runs, but slower or with less."""
    return Finding(name, "WARN", str(found), fix)


def fail(name: str, found: object, fix: str) -> Finding:
    """It does not run, or not rightly."""
    return Finding(name, "FAIL", str(found), fix)
