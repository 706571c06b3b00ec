"""A rank that computes and does not write: the run as rank 0 has it, without its directory.

It knows every figure, because all ranks compute the same ones. So it can take over in one case:
rank 0 was killed, and the last complete update would be lost with it.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vise_fast.engine.rollout import Engine
from vise_fast.images.sources import Source
from vise_fast.method.experience import Played
from vise_fast.model.load import Policy
from vise_fast.ranks.ranks import Ranks
from vise_fast.run import identity
from vise_fast.run.directory import ALARMED, Run, Steps
from vise_fast.run.resume import Start
from vise_fast.system import files
from vise_fast.system.console import Console, JsonLines, read_lines
from vise_fast.system.errors import EnvironmentFault, UserError


def open_run(start: Start, ranks: Ranks, verbose: bool = False) -> Run:
    """The run on rank 0, what goes along with it on others."""
    return Run(start, ranks, verbose) if ranks.rank == 0 else Follower(start, ranks)


LOOKS = 50
PAUSE_S = 0.1
"""How often, and how far apart, the lock of a rank that was killed is tried."""


class Follower(Run):
    """Rank 1 and further ones. `record`: the figures of the last complete update."""

    record: Mapping[str, Any] | None = None

    def _begin(self, start: Start) -> None:
        self.console = Console.of_rank(self.ranks.rank)

    def close(self) -> None:
        """Nothing is open, unless it took over."""
        if self.opened:
            super().close()

    @property
    def log_place(self) -> Path:
        """The run's folder, where this machine sees it; elsewhere one that is removed again."""
        if self.directory.is_dir():
            return self.directory
        self._scratch = tempfile.TemporaryDirectory()
        return Path(self._scratch.name)

    def opening(self, policy: Policy, source: Source) -> None:
        """Rank 0 writes the first files."""

    def before(self, engine: Engine, source: Source) -> None:
        """Rank 0 evaluates, and tells where the alarms begin."""
        self.alarms.begin_at(self.ranks.first(dict))

    @contextlib.contextmanager
    def progress(self) -> Iterator[Steps]:
        """Yields what counts the steps and watches the alarms."""
        yield _Counted(self, _unseen)

    def keep(self) -> None:
        """Rank 0 saves."""

    def finish(self, policy: Policy, engine: Engine, source: Source) -> None:
        """Rank 0 evaluates and exports."""

    def fall_back(self) -> None:
        """Rank 0 goes back to the last healthy checkpoint, and exports that."""
        self.code = ALARMED

    def save_finished(self) -> None:
        """Only where rank 0 was killed, and this is the next one."""
        lower = set(range(self.ranks.rank))
        if self.done > self.first and lower <= set(self.ranks.missing()):
            with contextlib.suppress(UserError):  # the fault that ends the run is the one to tell
                self._take_over()
                super().save_finished()

    def _take_over(self) -> None:
        """Become the one that writes. Raises EnvironmentFault where the run lies elsewhere, or is
        held.
        """
        if not identity.is_run(self.directory):
            raise EnvironmentFault(f"{self.directory} is not on this machine")
        self.lock = self._lock()
        files.settle(self.directory / "adapter")
        self.console = Console()
        self.metrics = JsonLines(self.directory / "metrics.jsonl", self.done)
        self.samples = JsonLines(self.directory / "samples.jsonl", self.done)
        self.opened = True
        self.saved = self._newest()
        written = [line.get("step") for line in read_lines(self.directory / "metrics.jsonl")]
        if self.record is not None and self.done not in written:
            self.unwritten.append(partial(self.metrics.write, self.record))

    def _lock(self) -> identity.Lock:
        """That of rank 0. A killed process is seen as gone when its first thread is, and holds its
        files until the last one is.
        """
        for _ in range(LOOKS):
            with contextlib.suppress(EnvironmentFault):
                return identity.Lock(self.directory)
            time.sleep(PAUSE_S)
        return identity.Lock(self.directory)


class _Counted(Steps):
    """Takes every finished step, and remembers the last."""

    def _tell(self, record: dict[str, Any], slices: list[Played]) -> None:
        assert isinstance(self.run, Follower)
        self.run.record = record


def _unseen(figures: Mapping[str, float]) -> None:
    """Shows nothing."""
