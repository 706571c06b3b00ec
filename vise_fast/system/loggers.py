"""tensorboard, trackio and wandb beside metrics.jsonl.

A logger that fails is named once and dropped; the run goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub.constants


class Logger(Protocol):
    """What is asked of a logger."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of one step, by name."""

    def close(self) -> None:
        """Writes out what is still held."""


class TensorBoard:
    """Event files in <run>/tensorboard."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(
            str(run_dir / "tensorboard")
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """trackio's own database, by the name of the run."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self.module = importlib.import_module("trackio")
        self.module.init(project="vise_fast", name=run_dir.name, config=dict(settings))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.module.log(dict(figures), step=step)

    def close(self) -> None:
        self.module.finish()


class WandB:
    """Weights & Biases; offline where the hub is."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        offline = {"mode": "offline"} if huggingface_hub.constants.HF_HUB_OFFLINE else {}
        self.run = importlib.import_module("wandb").init(
            project="vise_fast",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(settings),
            **offline,
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
}


class Loggers:
    """Those of `names` that work; `complain` is told once of each that does not."""

    def __init__(
        self,
        names: Sequence[str],
        run_dir: str | Path,
        settings: Mapping[str, Any],
        complain: Callable[[str], None],
    ) -> None:
        self.complain = complain
        self.alive: dict[str, Logger] = {}
        for name in names:
            logger = self._guarded(name, KINDS[name], Path(run_dir), settings)
            if logger is not None:
                self.alive[name] = logger

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Passes on the numbers of a record."""
        figures = {
            key: float(value)
            for key, value in record.items()
            if isinstance(value, int | float) and key != "step"
        }
        for name, logger in list(self.alive.items()):
            self._guarded(name, logger.log, step, figures)

    def close(self) -> None:
        """Closes each; what a logger says then is its last word."""
        for name, logger in list(self.alive.items()):
            self._guarded(name, logger.close)

    def _guarded(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        # a logger may fail in any way it likes; nothing of ours runs in here
        try:
            return call(*arguments)
        except Exception as fault:
            self.alive.pop(name, None)
            self.complain(
                f"logger {name} failed and is dropped: {type(fault).__name__}: "
                f"{' '.join(str(fault).split())[:200]}; metrics.jsonl goes on"
            )
            return None
