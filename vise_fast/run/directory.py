"""One training run as it appears on disk and on screen: its directory, its metrics, checkpoints,
evaluation, adapter and report.

The loop (train.py) computes; this file remembers and tells. Directory layout: README, "What a run
leaves behind".
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import PIL.Image
import torch
import transformers
import vise_kernels

from vise_fast import __version__
from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config
from vise_fast.engine.fast import Engine
from vise_fast.evaluate import held_out as evaluate
from vise_fast.evaluate.titles import BRIEF
from vise_fast.images.sources import Source
from vise_fast.method.experience import Played
from vise_fast.method.learner import Learner
from vise_fast.model import export as adapter
from vise_fast.model.load import Policy, check_targets
from vise_fast.report import page as report
from vise_fast.report.alarms import Alarms
from vise_fast.system import checkpoint
from vise_fast.system.console import Console, JsonLines
from vise_fast.system.errors import EnvironmentFault
from vise_fast.system.loggers import Loggers
from vise_fast.system.signals import Interrupted

SHOWN = ("reward", "kl", "area", "parse_rate", "images_per_s")
CARDS = 2


class Run:
    """The directory and the screen of one run. Begin with `Run.begin`; the methods follow the life
    of the run.
    """

    def __init__(self, config: Config, directory: Path, resumed: Path | None) -> None:
        self.config = config
        self.directory = directory
        self.resumed = resumed
        self.console = Console()
        self.alarms = Alarms(config.update.tau)
        self.first = 0
        self.evaluation: dict = {}

    @classmethod
    def begin(cls, config: Config) -> Run:
        """Choose the directory: the one to resume, or a fresh one (name, name-2, …) so that no
        earlier run is touched.
        """
        wanted = Path(config.run.dir)
        if config.train.resume is None:
            return cls(config, _fresh(wanted), None)
        choice = checkpoint.choose(config.train.resume, wanted)
        directory = wanted if choice.path is None else choice.path.parent.parent
        run = cls(config, directory, choice.path)
        for note in choice.notes:
            run.console.warn(note)
        return run

    def resume(self, learner: Learner) -> int:
        """Load the checkpoint, if there is one; returns the first step to do."""
        if self.resumed is not None:
            tensors, state = checkpoint.load(self.resumed)
            learner.load(tensors, state["learner"])
            self.alarms.load(state["alarms"])
            self.first = state["step"]
            self.console.say(f"resumed from {self.resumed} after step {self.first}")
        return self.first

    def opening(self, policy: Policy, source: Source) -> None:
        """Create the directory and its first files; say what runs on what."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "config.yaml").write_text(
                configuration.to_yaml(self.config), encoding="utf-8"
            )
            (self.directory / "env.json").write_text(
                json.dumps(environment(policy), indent=1) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise EnvironmentFault(
                f"cannot write {self.directory}; {error.strerror or error}; free space or choose "
                "another run.dir"
            ) from error
        self.metrics = JsonLines(self.directory / "metrics.jsonl", self.first)
        self.samples = JsonLines(self.directory / "samples.jsonl", self.first)
        self.loggers = Loggers(
            self.config.run.loggers,
            self.directory,
            self.config.model_dump(mode="json"),
            self.console.warn,
        )
        base, lora = (
            sum(p.numel() for p in policy.model.parameters() if p.requires_grad is trained)
            for trained in (False, True)
        )
        paths = ", ".join(f"{op} {path}" for op, (path, _) in vise_kernels.available().items())
        self.console.say(
            f"run      {self.directory}  (preset {self.config.reward.preset}, "
            f"{self.config.train.steps} updates of {self.config.train.batch} images)"
        )
        self.console.say(
            f"model    {self.config.model.path}: {base / 1e6:.1f} M frozen parameters, one copy; "
            f"{check_targets(policy.model)} LoRA tensors, {lora / 1e6:.2f} M trained"
        )
        self.console.say(f"data     {source.describe()}")
        self.console.say(f"device   {policy.device}, {policy.backbone.dtype}; kernels: {paths}")
        self.console.say(f"attention {policy.attention.path}: {policy.attention.reason}")

    def before(self, engine: Engine, source: Source) -> None:
        """The base's figures on held-out images, once per run."""
        path = self.directory / "evaluation.json"
        if path.exists() and self.first > 0:
            self.evaluation = json.loads(path.read_text(encoding="utf-8"))
            return
        self._evaluate("before", engine, source, adapters=False)

    def _evaluate(self, name: str, engine: Engine, source: Source, adapters: bool) -> None:
        if self.config.eval.scenes == 0:
            return
        self.console.say(
            f"evaluating {'the adapter' if adapters else 'the base'} on held-out images …"
        )
        self.evaluation[name] = evaluate.held_out(engine, source, self.config, adapters).json()
        (self.directory / "evaluation.json").write_text(
            json.dumps(self.evaluation) + "\n", encoding="utf-8"
        )

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable]:
        """Yields `advance(step, metrics, slices)`: one line of metrics, the live figures, alarms,
        sample cards.
        """
        with (
            self.console.progress(self.config.train.steps, "train", self.first) as bar,
            contextlib.ExitStack() as stack,
        ):
            for stream in (self.metrics, self.samples, self.loggers):
                stack.callback(stream.close)
            clock = time.monotonic()

            def advance(step: int, metrics: dict, slices: list[Played]) -> None:
                nonlocal clock
                now = time.monotonic()
                metrics = {
                    "step": step + 1,
                    **metrics,
                    "seconds": now - clock,
                    "images_per_s": self.config.train.batch / (now - clock),
                }
                clock = now
                said = self.alarms.update(step + 1, metrics)
                for name, text in said.items():
                    self.console.alarm(name, text)
                metrics["alarms"] = [name for name, text in said.items() if text]
                self.metrics.write(metrics)
                self.loggers.log(step + 1, metrics)
                bar({name: metrics[name] for name in SHOWN})
                if (
                    step == 0
                    or (step + 1) % self.config.run.samples_every == 0
                    or step + 1 == self.config.train.steps
                ):
                    self._cards(step + 1, slices)

            yield advance

    def _cards(self, step: int, slices: list[Played]) -> None:
        """The first images of the batch with everything said about them, for the report."""
        played = slices[0]
        (self.directory / "samples").mkdir(exist_ok=True)
        for index in range(min(CARDS, len(played.images))):
            name = f"samples/step_{step}_{index}.png"
            PIL.Image.fromarray(played.images[index].pixels.numpy()).save(self.directory / name)
            self.samples.write({"step": step, "image": name, **card(played, index)})

    def keep(self, done: int, learner: Learner) -> None:
        """A checkpoint every so often; none while an alarm that may end the run is on, so that the
        newest stays a healthy one.
        """
        every = self.config.run.checkpoint_every
        if (
            every
            and done % every == 0
            and done < self.config.train.steps
            and not (self.config.train.stop_on_alarm and self.alarms.since is not None)
        ):
            self._save(done, learner)

    def _save(self, done: int, learner: Learner) -> Path:
        tensors, state = learner.state()
        content = {"step": done, "learner": state, "alarms": self.alarms.state()}
        return checkpoint.save(self.directory, done, tensors, content, self.config.run.keep)

    def should_stop(self, done: int) -> bool:
        """An alarm has been on for ten steps and the user asked to end then."""
        return (
            self.config.train.stop_on_alarm
            and self.alarms.since is not None
            and done - self.alarms.since >= 10
        )

    def interrupted(self, learner: Learner, done: int, reason: Interrupted) -> int:
        """Save what is finished and say how to go on; returns the exit code."""
        self._save(done, learner)
        self.console.warn(
            f"{reason}; saved after step {done}; go on with --train.resume auto --run.dir "
            f"{self.directory}"
        )
        return reason.code

    def fall_back(self, learner: Learner) -> None:
        """After an alarm ended the run: return to the last healthy checkpoint."""
        newest = checkpoint.latest(self.directory)
        if newest is None:
            self.console.warn(
                "stopped by an alarm before any healthy checkpoint; the adapter is the unhealthy "
                "one"
            )
            return
        tensors, state = checkpoint.load(newest)
        learner.load(tensors, state["learner"])
        self.console.warn(
            f"stopped by an alarm; the adapter is the one of step {state['step']}, the last "
            "healthy checkpoint"
        )

    def finish(
        self, policy: Policy, engine: Engine, source: Source, learner: Learner, done: int
    ) -> None:
        """Final checkpoint, evaluation, table, adapter, report."""
        self._save(done, learner)
        self._evaluate("after", engine, source, adapters=True)
        figures = evaluate.side_by_side(self.evaluation, BRIEF) if self.evaluation else {}
        if figures:
            self.console.table(
                "held-out images, before and after",
                ["", "base", "adapter"],
                [[name, *pair] for name, pair in figures.items()],
            )
        place = adapter.export(policy, self.config, self.directory / "adapter", figures)
        if self.config.run.report:
            self.console.say(f"report   {report.write(self.directory)}")
        self.console.say(f"adapter  {place}")


def _fresh(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … where no run lies yet."""
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{n}") for n in range(2, 10_000))]
    return next(
        path
        for path in names
        if not (path / "metrics.jsonl").exists() and not (path / "checkpoints").exists()
    )


def card(played: Played, index: int) -> dict:
    """One image's part of a step as JSON: query, boxes, verdicts, views."""
    e = played.evidence
    group = played.evidence.group_size
    rows = slice(index * group, (index + 1) * group)
    listed = lambda x: None if x is None else x[rows].tolist()
    return {
        "name": played.images[index].name,
        "query": played.queries.texts[index],
        "query_written": played.queries.written[index],
        "boxes_1000": listed(e.box_1000),
        "readable": listed(e.readable),
        "written": played.boxes.written[rows],
        "seen": float(e.seen[rows][0]),
        "gone": listed(e.gone),
        "control": listed(e.control),
        "keep": listed(e.keep),
        "rewards": played.rewards[rows].tolist(),
        "judged": listed(e.judged),
        "views": [
            {"kind": view.kind, "matrix_px": view.matrix_px.tolist()}
            for view in played.views[index]
        ],
        "view_boxes_1000": e.view_box_1000[rows][0].tolist(),
    }


def environment(policy: Policy) -> dict:
    """What a result depends on beside configuration and seed."""
    device = policy.device
    return {
        "vise_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "dtype": str(policy.backbone.dtype),
        "argv": sys.argv[1:],
        "attention": [policy.attention.path, policy.attention.reason],
        "kernels": {op: [path, reason] for op, (path, reason) in vise_kernels.available().items()},
    }
