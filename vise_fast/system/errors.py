"""The faults a user can cause, each one line: what happened; why; what to do.

The exit code belongs to the kind of fault.
"""

from __future__ import annotations


class UserError(Exception):
    """A fault with a one-line message and a documented exit code; shown without a traceback."""

    code = 1


class ConfigError(UserError):
    code = 2


class DataError(UserError):
    code = 3


class EnvironmentFault(UserError):
    code = 4


class MemoryFloor(UserError):
    code = 5


class NumericFault(UserError):
    code = 6
