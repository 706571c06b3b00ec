"""The faults a user can cause, each one line: what happened; why; what to do.

The exit code belongs to the kind of fault.
"""

from __future__ import annotations


class UserError(Exception):
    """A fault with a one-line message and a documented exit code; shown without a traceback."""

    code = 1


class ConfigError(UserError):
    """A configuration, a command line or a file named there that cannot be meant."""

    code = 2


class DataError(UserError):
    """Images, or a run's own files, that cannot be used."""

    code = 3


class EnvironmentFault(UserError):
    """A machine that lacks what is needed: a device, a package, space on its disk."""

    code = 4


class MemoryFloor(UserError):
    """No configuration fits the memory."""

    code = 5


class NumericFault(UserError):
    """Numbers that are not finite where they must be."""

    code = 6


class SaidElsewhere(UserError):
    """Another process of the same run ended it, and says why; `code` is that one's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another rank ended the run with code {code}")
        self.code = code


class LostRank(EnvironmentFault):
    """Another process of the same run ended without a word."""
