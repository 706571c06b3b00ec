"""The stretches of a step by name, and the most bytes alive in each: a clock that reads memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vise_fast.estimate.live_bytes import Live
from vise_fast.system.machine.clock import Clock

LABELS = {
    "views": "images and vision features",
    "encode": "images and vision features",
    "prefix": "prefix keys and values",
    "reference prefix": "reference keys and values",
    "reference scores": "activations",
    "scores": "activations",
    "update": "activations",
    "head": "head workspace",
    "backward": "gradients in flight",
    "optimizer": "optimizer",
}
"""Under which component what is made in a stage is counted; elsewhere it is the rollout's."""


class Stages(Clock):
    """Stands where an engine's clock stands; its phases are the stages. A stage inside another is
    one of its own, named after both, and what comes before and after it belongs to the outer one:
    through two depths a line can be drawn only if each stretch has one moment that needs most.
    """

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live
        self.peaks: dict[str, dict[str, int]] = {}
        self._names: list[str] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges what runs inside to `name`, within the stage around it."""
        self._close()
        self._names.append(name)
        with self.live.labelled(LABELS.get(name, "rollout")):
            yield
            self._close()
        self._names.pop()

    def _close(self) -> None:
        """The stretch since the last call ends here."""
        if self._names:
            name = ": ".join(self._names)
            found = {label: size for label, size in self.live.at_peak.items() if size}
            known = self.peaks.get(name, {})
            self.peaks[name] = max(found, known, key=lambda parts: sum(parts.values()))
        self.live.restart()
