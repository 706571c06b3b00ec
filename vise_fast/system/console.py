"""All that a person sees, and the lines a run leaves behind: progress, tables, alarms, errors,
metrics.jsonl.

The only file that prints or imports rich. A terminal gets a live bar, anything else gets plain
lines. Texts from a model or a file name are shown as they are: no markup, no control codes. Left
out: tensorboard and its like (loggers.py).
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, cast

import rich.box
import rich.console
import rich.table
import rich.text
from rich.progress import BarColumn, Progress, ProgressColumn, Task

from vise_fast.system import files, streams
from vise_fast.system.errors import ConfigError, DataError, SaidElsewhere, UserError
from vise_fast.system.streams import Forgiving

PLAIN_WIDTH = 160  # of tables where there is no terminal to ask; more where one needs more
WIDEST = 10_000  # of a table, while it is measured
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal
BAR = 20  # columns of a live bar
STEPS = 10_000  # in which a bar moves: each takes as long as reading a small file's header
SOME = 1_000  # things of an unknown number between two looks at the clock
T = TypeVar("T")


class Console:
    """Prints to `file` (standard output) and complaints to `errors` (standard error); `plain` None:
    a live bar on terminals only. A stream that is closed, broken or full ends nothing: what it
    refuses is dropped.
    """

    def __init__(
        self, file: TextIO | None = None, errors: TextIO | None = None, plain: bool | None = None
    ) -> None:
        self._out = _rich(file or sys.stdout, plain)
        self._err = _rich(errors or sys.stderr, plain)
        self.plain = not self._out.is_terminal
        if self._out.is_terminal and self._err.is_terminal:
            self._err = self._out  # one screen: a live bar must know of every line
        self._alarms: set[str] = set()
        self._live: Progress | None = None

    @classmethod
    def of_rank(cls, rank: int) -> Console:
        """Of several processes that do the same, the first one tells of it."""
        if rank == 0:
            return cls()
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (as long as the process)
        return cls(nowhere, nowhere, plain=True)

    def say(self, text: str = "") -> None:
        """Text on standard output."""
        self._print(self._out, text)

    def warn(self, text: str) -> None:
        """What a person should know of, on standard error."""
        self._print(self._err, f"warning: {text}", "yellow")

    def alarm(self, name: str, text: str | None) -> None:
        """Says that a figure left its healthy range (`text`), or is back in it (None); only changes
        are printed.
        """
        if text is not None:
            if name not in self._alarms:
                self._print(self._err, f"alarm: {text}", "bold red")
            self._alarms.add(name)
        elif name in self._alarms:
            self._print(self._err, f"alarm over: {name}", "green")
            self._alarms.remove(name)

    def error(self, fault: BaseException, debug: bool = False) -> None:
        """One line; the traceback only on request. Nothing where another process says it."""
        if isinstance(fault, SaidElsewhere):
            return
        if debug:
            self._print(self._err, "".join(traceback.format_exception(fault)).rstrip())
        self._print(self._err, f"error: {' '.join(str(fault).split())}", "bold red")

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        align: Literal["left", "right"] = "right",
    ) -> None:
        """A table; the first column holds names on the left, the others are aligned as told and
        their numbers cut to four digits.
        """
        table = rich.table.Table(
            title=self._shown(title) or None,
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD,  # a before/after table fits 80 columns in it
            pad_edge=False,
            show_edge=False,
        )
        for index, column in enumerate(columns):
            table.add_column(self._shown(column), justify="left" if index == 0 else align)
        for row in rows:
            table.add_row(*(self._shown(figure(cell)) for cell in row))
        if self.plain:
            self._out.width = WIDEST
            self._out.width = max(PLAIN_WIDTH, self._out.measure(table).maximum)
        self._out.print(table)

    @contextmanager
    def progress(
        self, total: int, label: str, done: int = 0
    ) -> Iterator[Callable[[Mapping[str, float]], None]]:
        """Yields `advance(figures)`, to be called once per step; shows counts, ETA and the latest
        figures.
        """
        if self.plain:
            yield _Lines(self, total, label, done).advance
            return
        with _bar(self._out) as bar:
            task = bar.add_task(self._shown(label), total=total, completed=done, figures={})
            self._live = bar
            try:
                yield lambda figures: bar.update(task, advance=1, figures=dict(figures))
            finally:
                self._live = None

    def through(self, things: Iterable[T], label: str) -> Iterator[T]:
        """The things, one after the other, with a bar (below the one of `progress` where that is
        live); where there is no terminal, with lines once it takes long. Where nobody knows how
        many there are, with how many there were so far.
        """
        if not isinstance(things, Collection):
            yield from self._counting(things, label)
            return
        if self.plain:
            lines = _Lines(self, len(things), label, 0)
            lines.said = lines.begun
            for thing in things:
                yield thing
                lines.advance({}, last=False)
            return
        live = self._live
        with _bar(self._out, transient=True) if live is None else nullcontext(live) as bar:
            task = bar.add_task(self._shown(label), total=len(things), figures={})
            every = max(1, len(things) // STEPS)
            try:
                for number, thing in enumerate(things, 1):
                    yield thing
                    if number % every == 0:
                        bar.update(task, completed=number)
            finally:
                bar.remove_task(task)

    def _counting(self, things: Iterable[T], label: str) -> Iterator[T]:
        if self._live is not None:
            yield from things
            return
        with self._so_far(label) as tell:
            for number, thing in enumerate(things, 1):
                yield thing
                if number % SOME == 0:
                    tell(f"{label} {number:,}")

    @contextmanager
    def _so_far(self, label: str) -> Iterator[Callable[[str], None]]:
        """What takes a changing label: a sign of life on a terminal, else lines, seldom."""
        if not self.plain:
            with Progress(_Label(), _Elapsed(), console=self._out, transient=True) as sign:
                task = sign.add_task(self._shown(label), total=None)
                yield lambda text: sign.update(task, description=self._shown(text))
            return
        said = time.monotonic()

        def say(text: str) -> None:
            nonlocal said
            if time.monotonic() - said >= PLAIN_SECONDS:
                said = time.monotonic()
                self.say(text)

        yield say

    @contextmanager
    def working(self, label: str) -> Iterator[None]:
        """On a terminal, a sign of life until the block ends: what is being done, and for how
        long.
        """
        if self.plain:
            yield
            return
        columns = (_Label(), _Elapsed())
        with Progress(*columns, console=self._out, transient=True, refresh_per_second=2) as sign:
            sign.add_task(self._shown(label), total=None)
            yield

    def _print(self, target: rich.console.Console, text: str, style: str | None = None) -> None:
        target.print(self._shown(text), style=style, soft_wrap=True)

    def _shown(self, text: str) -> str:
        """Printable in the terminal's own encoding: control codes and letters it lacks are written
        as escapes.
        """
        shown = "".join(
            c
            if c == "\n" or unicodedata.category(c)[0] != "C"
            else c.encode("unicode_escape").decode()
            for c in text
        )
        return shown.encode(self._out.encoding, "backslashreplace").decode(self._out.encoding)


class _Lines:
    """Progress where there is no terminal: a line at the first step, the last, and every few
    seconds.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        label: str,
        done: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self.total = total
        self.label = label
        self.first = done
        self.done = done
        self.clock = clock
        self.begun = clock()
        self.said = -math.inf

    def advance(self, figures: Mapping[str, float], last: bool = True) -> None:
        """One step is done. last: the last one is said however soon it comes."""
        self.done += 1
        now = self.clock()
        ends = last and self.done == self.total
        if not ends and now - self.said < PLAIN_SECONDS:
            return
        self.said = now
        left = (now - self.begun) / (self.done - self.first) * (self.total - self.done)
        line = f"{self.label} {self.done}/{self.total}  ETA {duration(left)}  {spread(figures)}"
        self.console.say(line.rstrip())


class JsonLines:
    """A file of one JSON object per line, each there whole or not at all; `last_step` cuts what a
    resumed run will write again.

    A last line cut short by a kill is dropped on opening; `dropped`: how many others that cannot be
    read were, too. Raises EnvironmentFault when the disk refuses.
    """

    def __init__(self, path: str | Path, last_step: int | None = None) -> None:
        self.path = Path(path)
        with files.refused(self.path):
            self.dropped = _cut(self.path, last_step)
            self._file = files.Appended(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; numbers that JSON has no word for (NaN, infinity) become null."""
        with files.refused(self.path):
            self._file.write(json.dumps(_finite(record)).encode() + b"\n")

    def sync(self) -> None:
        """What was written outlives a power cut."""
        with files.refused(self.path):
            self._file.sync()

    def close(self) -> None:
        """Closes the file; what was written is in it already."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The whole records of a JSON-lines file; [] where there is none. Raises DataError where it
    cannot be read.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        content = files.read(path, files.LARGEST_LINES)
    except OSError as fault:
        raise DataError(
            f"{path} cannot be read: {fault.strerror}; make it readable or move it away"
        ) from None
    records = [_record(line) for line in content.decode("utf-8", "replace").splitlines()]
    return [record for record in records if record is not None]


def run(main: Callable[[Sequence[str]], int | None], words: Sequence[str] | None = None) -> int:
    """The exit status of a command: a UserError becomes its one line and its code, Ctrl-C 130;
    `--debug` adds the traceback. A stream that breaks changes neither.
    """
    streams.guard()
    words = sys.argv[1:] if words is None else words
    try:
        return main(words) or 0
    except UserError as fault:
        return _ended_by(fault, words)
    except OSError as fault:
        if fault.errno != errno.ENAMETOOLONG:
            raise
        named = f"{fault.filename!s:.40}…"
        return _ended_by(
            ConfigError(f"{named} is longer than the name of a file may be; shorten it"), words
        )
    except KeyboardInterrupt:
        Console().error(KeyboardInterrupt("interrupted"), debug="--debug" in words)
        return 130


def _ended_by(fault: UserError, words: Sequence[str]) -> int:
    Console().error(fault, debug="--debug" in words)
    return fault.code


def figure(value: Any) -> str:
    """A cell as text: whole numbers whole, others with four digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    return str(value)


def fitting(figures: Mapping[str, float], room: int) -> str:
    """As many whole figures of `spread`, from the first on, as `room` columns hold."""
    shown: dict[str, float] = {}
    for name, value in figures.items():
        if len(spread(shown | {name: value})) > room:
            break
        shown[name] = value
    return spread(shown)


def spread(figures: Mapping[str, float]) -> str:
    """'reward 0.52  KL 0.0031'"""
    return "  ".join(f"{name} {figure(value)}" for name, value in figures.items())


def counted(count: int, noun: str) -> str:
    """'1 update', '2 updates'"""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """'4s', '3m20s', '2h05m'"""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class _Label(ProgressColumn):
    """What is being done."""

    def render(self, task: Task) -> rich.text.Text:
        return _line(task.description)


class _Elapsed(ProgressColumn):
    """For how long."""

    def render(self, task: Task) -> rich.text.Text:
        return _line(f"… {duration(task.elapsed or 0.0)}")


class _Count(ProgressColumn):
    """'40/200  ETA 3m20s'; the time is that of rich, over the latest steps."""

    def render(self, task: Task) -> rich.text.Text:
        left = "?" if task.time_remaining is None else duration(task.time_remaining)
        return _line(f"{task.completed:.0f}/{task.total:.0f}  ETA {left}")


class _Figures(ProgressColumn):
    """The latest figures, as many of them as the line has room for."""

    def __init__(self, screen: rich.console.Console) -> None:
        super().__init__()
        self.screen = screen

    def render(self, task: Task) -> rich.text.Text:
        others = len(f"{task.description} {task.total:.0f}/{task.total:.0f}  ETA 00m00s ")
        return _line(fitting(task.fields["figures"], self.screen.width - BAR - 2 - others))


def _line(text: str) -> rich.text.Text:
    """Never folded, never cut in favour of another column."""
    return rich.text.Text(text, no_wrap=True, overflow="ignore")


def _bar(screen: rich.console.Console, transient: bool = False) -> Progress:
    return Progress(
        _Label(),
        BarColumn(BAR),
        _Count(),
        _Figures(screen),
        console=screen,
        transient=transient,
    )


def _rich(stream: TextIO | None, plain: bool | None) -> rich.console.Console:
    return rich.console.Console(
        file=cast(TextIO, Forgiving(stream)),
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=None if plain is None else not plain,
    )


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _cut(path: Path, last_step: int | None) -> int:
    """Keeps whole records up to `last_step`; rewritten aside, so that a kill here loses nothing.
    Returns how many whole lines were no records.
    """
    if not path.exists():
        return 0
    old = files.read(path, files.LARGEST_LINES)
    lines = old.decode("utf-8", "replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    keep = [line for line in whole if _kept(line, last_step)]
    new = "".join(keep).encode()
    if new != old:
        files.write(path, new)
    return sum(_record(line) is None for line in whole)


def _kept(line: str, last_step: int | None) -> bool:
    record = _record(line)
    if record is None or last_step is None:
        return record is not None
    step = record.get("step", 0)
    return isinstance(step, int) and step <= last_step


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return value
