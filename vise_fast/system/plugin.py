"""A python file of the user's own. It is run once; whatever goes wrong in it, then or when one of
its functions is called, becomes one line with the file and the line it happened in.

Left out: what such a file is for: `reward.plugin` registers rewards, `run.plugins` families, views,
prompt styles and rewards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vise_fast.system.errors import ConfigError


def travels() -> tuple[type[BaseException], ...]:
    """What is no fault of the file's: memory that ran out. torch is asked where it is loaded; help
    and settings do not wait for it.
    """
    torch = sys.modules.get("torch")
    return (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)


def load(path: str, setting: str) -> ModuleType:
    """The module that a file is, run the first time it is asked for; `setting` names it in
    messages.

    Raises ConfigError when it is missing, is not python, or raises anything.
    """
    file = Path(os.path.abspath(os.path.expanduser(path)))
    name = "vise_fast_plugin_" + "".join(c if c.isalnum() else "_" for c in str(file))
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(
            f"{setting} {path}: no such file; it should be a python file; correct the path"
        )
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"{setting} {path}: not a python file; its name should end in .py; rename it"
        )
    module = importlib.util.module_from_spec(spec)
    with blamed(f"{setting} could not be imported", file):
        spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@contextlib.contextmanager
def blamed(what: str, source: Path | Callable) -> Iterator[None]:
    """Whatever is raised inside becomes the ConfigError "what: file and line: fault"; `source` is
    the file, or the function, that is run there.
    """
    try:
        yield
    except travels():
        raise
    except (Exception, SystemExit) as fault:
        file = source if isinstance(source, Path) else _file_of(source)
        line = None if file is None else _line_in(fault, file)
        place = where(source) if line is None else f"{file} line {line}"
        kind = "" if isinstance(fault, ConfigError) else f"{type(fault).__name__}: "
        said = " ".join(str(fault).split())[:300]
        raise ConfigError(f"{what}: {place}: {kind}{said}; correct it") from fault


def where(source: Path | Callable) -> str:
    """File and first line of a function, as far as it tells."""
    if isinstance(source, Path):
        return str(source)
    code = getattr(inspect.unwrap(source), "__code__", None)
    return str(source) if code is None else f"{code.co_filename} line {code.co_firstlineno}"


def _file_of(function: Callable) -> Path | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else Path(code.co_filename)


def _line_in(fault: BaseException, file: Path) -> int | None:
    """The last line of the file that a fault went through, or that it says is no python."""
    if isinstance(fault, SyntaxError) and fault.filename == str(file):
        return fault.lineno
    frames: list[Any] = traceback.extract_tb(fault.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else None
