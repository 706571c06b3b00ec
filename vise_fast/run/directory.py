"""One training run as it appears on disk and on screen: its directory, metrics, checkpoints,
evaluation, adapter and report; and how it ends.

The loop (train.py) computes; this file remembers and tells. Any end saves what was finished: the
last complete update, never a half-moved adapter. Directory layout: README, "What a run leaves
behind".
"""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import PIL.Image

from vise_fast.config import commands, schema
from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.evaluate.held_out import held_out
from vise_fast.evaluate.results import Results
from vise_fast.evaluate.table import BY_CLASS, by_class, side_by_side
from vise_fast.evaluate.titles import BRIEF
from vise_fast.images.sources import Source
from vise_fast.method.experience import Played
from vise_fast.method.learner import Learner
from vise_fast.model.load import Policy
from vise_fast.model.saved import card, export, side_files
from vise_fast.ranks.ranks import Alone, Ranks
from vise_fast.report import page as report
from vise_fast.report import stored_run
from vise_fast.report.alarms import GAP_LIMIT, GAP_LIMIT_QUANTISED, Alarms, looked_at
from vise_fast.run import identity, interim
from vise_fast.run.interim import Interim
from vise_fast.run.opening import (
    environment,
    lacking,
    opening_lines,
    ranks_lines,
    verbose_lines,
)
from vise_fast.run.resume import Start
from vise_fast.run.sample import sample
from vise_fast.system import checkpoint, files
from vise_fast.system.console import Console, JsonLines, read_lines
from vise_fast.system.errors import DataError, EnvironmentFault
from vise_fast.system.loggers import Loggers
from vise_fast.system.signals import Interrupted

SHOWN = ("reward", "kl", "area", "parse_rate", "images_per_s")
SAMPLES = 2  # images of a batch that samples.jsonl tells of
ALARMED = 7
"""The exit code of a run that an alarm ended (`train.stop_on_alarm`), in good order."""
PATIENCE = 10
"""Steps an alarm may stay on before it ends a run that asked for it."""


class Run:
    """The directory and the screen of one run; the methods follow its life. `done`: complete
    updates, `saved`: those the newest checkpoint holds (-1: there is none).
    """

    lock: identity.Lock

    def __init__(self, start: Start, ranks: Ranks | None = None, verbose: bool = False) -> None:
        self.ranks = ranks or Alone()
        self.config = start.config
        self.verbose = verbose
        self.directory = start.directory
        self.resumed = start.checkpoint
        self.older = start.older
        self.alarms = alarms_of(self.config)
        self.interim = Interim(self.config.eval)
        self.away = 0.0
        """Seconds of the step under way that were no training."""
        self.latest: tuple[int, Results] | None = None
        """Of the adapter as it is now: the step, and what was measured then."""
        self.evaluations: JsonLines | None = None
        self.evaluation: dict[str, dict] = {}
        self.learner: Learner | None = None
        self.first = 0
        self.done = 0
        self.saved = -1
        self.opened = False
        self.code = 0
        """To leave with, where nothing else ends the run."""
        self.unwritten: deque[Callable[[], None]] = deque()
        self.free = False
        self._begin(start)
        self.loggers = Loggers((), self.directory, {}, self.console.warn)

    def _begin(self, start: Start) -> None:
        """Take the directory; nobody else writes there until `close`."""
        self.console = Console()
        self.free = identity.is_free(self.directory)
        self.lock = identity.Lock(self.directory)
        for note in start.notes:
            self.console.warn(note)
        if not self.lock.known:
            self.console.warn(
                f"{self.directory} lies on a file system without locks; do not let two processes "
                "write there"
            )

    def close(self) -> None:
        """Let others write here; a folder in which nothing was begun goes."""
        self.loggers.close()
        if self.opened:
            self.metrics.close()
            self.samples.close()
            if self.evaluations is not None:
                self.evaluations.close()
        elif self.free:
            identity.leave(self.directory)
        self.lock.release()

    @property
    def log_place(self) -> Path:
        """Where unusable images are listed."""
        return self.directory

    # ---- the start -------------------------------------------------------------------------------

    def resume(self, learner: Learner) -> None:
        """Take over the learner and load the checkpoint into it, if there is one. Raises
        checkpoint.Corrupt where neither it nor an older one can be gone on with.
        """
        if self.resumed is not None:
            self.resumed = self._loaded(learner, [self.resumed, *self.older])
            here = self.directory / "checkpoints" / self.resumed.name
            self.saved = self.done if here.exists() else -1
            self.console.say(f"resumed from {self.resumed} after step {self.first}")
        self.learner = learner

    def _loaded(self, learner: Learner, found: Sequence[Path]) -> Path:
        """The first of some checkpoints that the model takes; those before it are said."""
        for number, path in enumerate(found):
            try:
                self._load(learner, path)
            except checkpoint.Corrupt as fault:
                if number + 1 == len(found):
                    raise
                why = str(fault).split(";")[0]
                self.console.warn(f"{path} is passed over: {why}")
                continue
            return path
        raise AssertionError("no checkpoint")

    def _load(self, learner: Learner, path: Path) -> None:
        found = self.ranks.first(partial(_read, path))
        if isinstance(found, checkpoint.Corrupt):
            raise found
        tensors, state = found
        alarms = alarms_of(self.config)
        looks = Interim(self.config.eval)
        note = None
        try:
            alarms.load(state["alarms"])
            if "interim" in state:
                note = looks.load(state["interim"], tensors.get("best", {}), learner.parameters)
            learned = state["learner"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise checkpoint.Corrupt(
                f"the checkpoint {path} does not tell what a run's does; use --resume auto to take "
                "an older one"
            ) from None
        learner.load(tensors, learned)
        if note is not None:
            self.console.warn(note)
        self.interim = looks
        self.alarms = alarms
        self.first = self.done = state["step"]

    def opening(self, policy: Policy, source: Source) -> None:
        """Make the directory a run and write its first files; say what runs on what.

        Raises DataError where a resumed run's images are others than they were.
        """
        with files.refused(self.directory):
            files.settle(self.directory / "adapter")
        self._check_data(source)
        identity.mark(self.directory, source.identity(), schema.to_yaml(self.config))
        own = environment(policy) | dict(self.ranks.describe())
        files.write_json(self.directory / "env.json", own)
        self.metrics = JsonLines(self.directory / "metrics.jsonl", self.first)
        self.samples = JsonLines(self.directory / "samples.jsonl", self.first)
        looked = self.directory / stored_run.EVALUATIONS
        if self.config.eval.every > 0 or looked.exists():
            self.evaluations = JsonLines(looked, self.first)
        self.opened = True
        self._check_lines()
        self._check_metrics()
        settings = self.config.model_dump(mode="json")
        loggers = self.config.run.loggers
        self.loggers = Loggers(loggers, self.directory, settings, self.console.warn)
        for line in opening_lines(self.directory, self.config, policy, source):
            self.console.say(line)
        for line in ranks_lines(self.ranks, self.config, policy):
            self.console.say(line)
        for line in verbose_lines(policy) if self.verbose else ():
            self.console.say(line)
        side_files.fetch(policy.source)
        for line in lacking(self.config):
            self.console.warn(line)

    def _check_data(self, source: Source) -> None:
        """A resumed run sees what it would have seen: the same images under the same names."""
        before = identity.data_of(self.directory, self._unchecked) if self.resumed else None
        now = source.identity()
        for name, setting in (("words", "data.queries"), ("labels", "eval.labels")):
            if before is not None and before.get(name) != now.get(name):
                raise DataError(
                    f"the {name} are not those of the run {self.directory}; a resumed run would "
                    f"not be the same one; give --{setting} the same content, or start a new run"
                )
        if before is not None and before != now:
            raise DataError(
                f"the images are not those of the run {self.directory} ({_counted(before)} then, "
                f"{_counted(now)} now); a resumed run would draw others; give --data.dir the same "
                "files, or start a new run: --lora.init_from "
                f"{quote(str(self.directory / 'adapter'))}"
            )

    def _unchecked(self, text: str) -> None:
        self.console.warn(f"{text}; it is not checked that they are the same, and written anew")

    def _check_lines(self) -> None:
        """Lines that could not be read are said."""
        for lines in (self.metrics, self.samples, self.evaluations):
            if lines is not None and lines.dropped:
                self.console.warn(f"{lines.path}: {lines.dropped} damaged lines are dropped")

    def _check_metrics(self) -> None:
        """Steps that the metrics lack are said: figures and report have a gap there."""
        records = read_lines(self.directory / "metrics.jsonl")
        said = {n for record in records if isinstance(n := record.get("step"), int)}
        missing = self.first - len([n for n in said if 1 <= n <= self.first])
        if missing:
            first = next(n for n in itertools.count(1) if n not in said)
            self.console.warn(
                f"metrics.jsonl lacks {missing} of the {self.first} steps before the checkpoint "
                f"(the first is {first}); curves and report have a gap there"
            )

    def before(self, engine: Engine, source: Source) -> None:
        """The base's figures on held-out images, once per run."""
        self.evaluation = self._known_evaluation() if self.first > 0 else {}
        if "before" not in self.evaluation:
            self._evaluate("before", engine, source, adapters=False)
        base = Results.of(self.evaluation, "before")
        known = {} if base is None else base.values
        if base is not None:
            interim.check_measured(self.config.eval, base)
        self.alarms.begin_at(self.ranks.first(lambda: known))  # all ranks stop at one step

    def _known_evaluation(self) -> dict[str, dict]:
        """What evaluation.json says; nothing, and that is said, where it is damaged."""
        path = self.directory / "evaluation.json"
        known = files.read_json(path, self._evaluated_again) or {}
        try:
            for name in ("before", "after"):
                Results.of(known, name)
        except ValueError as fault:
            self._evaluated_again(f"{path} is damaged: {fault}")
            return {}
        return known

    def _evaluated_again(self, text: str) -> None:
        self.console.warn(f"{text}; the base is evaluated again")

    def _evaluate(self, name: str, engine: Engine, source: Source, adapters: bool) -> None:
        if self.config.eval.scenes == 0:
            return
        if adapters and self.latest is not None and self.latest[0] == self.done:
            found = self.latest[1]  # of this very adapter, a moment ago
        else:
            who = "the adapter" if adapters else "the base"
            self.console.say(f"evaluating {who} on held-out images …")
            found = held_out(engine, source, self.config, adapters, self.console.through)
        self.evaluation[name] = found.json()
        files.write_json(self.directory / "evaluation.json", self.evaluation)

    # ---- the loop --------------------------------------------------------------------------------

    def look(self, engine: Engine, source: Source) -> None:
        """An evaluation of the adapter as it is now, where one is due (`eval.every`): it changes
        nothing that the next update depends on. All ranks wait for it and know its figures.
        """
        if not self.interim.due(self.done, self.config.train.steps):
            return
        assert self.learner is not None
        begun = time.monotonic()
        seen = self.ranks.first(lambda: self._look(engine, source))
        self.alarms.take(seen.alarms)
        adapter = partial(interim.copied, self.learner.parameters)
        # what will be ended for an alarm is not the best, whatever its figure says
        self.interim.take(self.done, {} if self.alarmed() else seen.values, adapter)
        engine.counters.take()  # none of its work is the next step's
        engine.clock.take()
        self.ranks.work({}, 0, engine.device)
        self.away += time.monotonic() - begun

    def _look(self, engine: Engine, source: Source) -> interim.Seen:
        """Measure, or take what an earlier process measured after this very step; write it down and
        tell it.
        """
        begun = time.monotonic()
        before = self._looked_before()
        found = before
        if found is None:
            found = held_out(engine, source, self.config, True, self.console.through)
        self.latest = (self.done, found)
        if before is None:
            assert self.evaluations is not None
            whole = {"step": self.done} | found.json()
            self.unwritten.append(partial(self.evaluations.write, whole))
        if before is None or not self._told_before():
            line = interim.record(self.done, found, time.monotonic() - begun)
            self.unwritten.append(partial(self.metrics.write, line))
        self.write_down()
        self.loggers.log(self.done, _for_loggers("adapter", found.values))
        base = Results.of(self.evaluation, "before")
        self.console.say(interim.said(self.done, base, found, self.config.eval))
        return interim.Seen(found.values, self._alarms_at(base, found))

    def _alarms_after(self) -> None:
        """What the last evaluation raises is said, however few there were."""
        after = Results.of(self.evaluation, "after")
        if after is not None:
            self._alarms_at(Results.of(self.evaluation, "before"), after)

    def _alarms_at(self, base: Results | None, found: Results) -> dict[str, str | None]:
        """What an evaluation raises; said."""
        said = looked_at(base, found, self.config.update.tau)
        for name, text in said.items():
            self.console.alarm(name, text)
        return said

    def _looked_before(self) -> Results | None:
        """What the lines of a resumed run hold of the step it goes on from."""
        if self.done > self.first or self.resumed is None:
            return None
        known = stored_run.evaluations(self.directory, self._measured_again)
        return known.get(self.done)

    def _told_before(self) -> bool:
        """Whether the metrics have the evaluation of this step: a kill may come between the two."""
        records = read_lines(self.directory / "metrics.jsonl")
        return any(stored_run.is_evaluation(r) and r.get("step") == self.done for r in records)

    def _measured_again(self, text: str) -> None:
        self.console.warn(f"{text}; what it held is measured again, if it is asked for")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Steps]:
        """Yields what takes every finished step: metrics, live figures, alarms, samples."""
        steps = self.config.train.steps
        with self.console.progress(steps, "train", self.first) as bar:
            yield Steps(self, bar)

    def alarmed(self) -> bool:
        """An alarm that may end the run is on: no checkpoint, so that the newest stays a healthy
        one.
        """
        return self.config.train.stop_on_alarm and self.alarms.on

    def keep(self) -> None:
        """A checkpoint every so often."""
        every = self.config.run.checkpoint_every
        due = every > 0 and self.done % every == 0 and self.done < self.config.train.steps
        if due and not self.alarmed():
            self._save()

    def write_down(self) -> None:
        """What there is to tell of the steps, in its order. What a disk refuses stays, and is tried
        again before the next checkpoint.
        """
        while self.unwritten:
            self.unwritten[0]()
            self.unwritten.popleft()

    def _save(self) -> None:
        """A checkpoint, and before it the lines of its steps: none of them is lost."""
        self.write_down()
        for lines in (self.metrics, self.samples, self.evaluations):
            if lines is not None:
                lines.sync()
        self._checkpoint()

    def _checkpoint(self) -> None:
        assert self.learner is not None
        tensors, state = self.learner.state()
        content = {"step": self.done, "learner": state, "alarms": self.alarms.state()}
        if self.config.eval.every > 0:
            content["interim"] = self.interim.state()
            tensors |= self.interim.tensors()
        own = {checkpoint.CONFIG: self.directory / "config.yaml"}
        keep = self.config.run.keep
        checkpoint.save(self.directory, self.done, tensors, content, keep, own)
        self.saved = self.done

    def should_stop(self) -> bool:
        """An alarm has been on for so long that the user asked to end then."""
        return self.alarmed() and self.alarms.stays_on(self.done, PATIENCE)

    # ---- the end ---------------------------------------------------------------------------------

    def finish(self, policy: Policy, engine: Engine, source: Source) -> None:
        """Final checkpoint, evaluation, table, adapter, report."""
        self._save()
        chosen = self._choose()
        self._evaluate("after", engine, source, adapters=True)
        self._alarms_after()
        engine.interrupted()
        figures = side_by_side(self.evaluation, BRIEF) if self.evaluation else {}
        if figures:
            rows = [[name, *pair] for name, pair in figures.items()]
            title = "held-out images, before and after"
            self.console.table(title, ["", "base", "adapter"], rows)
            if of_classes := by_class(self.evaluation):
                self.console.table("labelled pictures by class", list(BY_CLASS), of_classes)
            self.loggers.log(self.done, self._held_out())
        made = card.Made(figures, source.identity(), chosen)
        place = export.export(policy, self.config, self.directory / "adapter", made)
        engine.interrupted()
        if self.config.run.report:
            self.console.say(f"report   {report.write(self.directory, self.console.warn)}")
        self.console.say(f"adapter  {place}")
        self.console.say(
            f"next     {commands.spoken('infer')} --adapter {quote(str(place))} --image photo.jpg"
        )

    def _choose(self) -> str:
        """The best adapter takes the place of the last one (`eval.keep_best`); returns the words
        that name it, "" where the last one stays.
        """
        best = self.interim.best
        name = self.config.eval.keep_best
        self.evaluation.pop("best", None)  # an earlier end's
        if self.interim.over:
            self.console.say(
                f"stopped  after step {self.done}: {self.interim.without} evaluations without a "
                f"better {name}"
            )
        if best is None:
            return ""
        assert self.learner is not None
        self.learner.take_adapter(best.adapter)
        if best.step != self.done:
            self.latest = None
        self.evaluation["best"] = {
            "figure": name,
            "step": best.step,
            "value": best.value,
            "last": self.done,
            "patience": self.interim.over,
        }
        chosen = (
            f"the adapter after step {best.step} of {self.done}, the best by {name} "
            f"({best.value:.4f})"
        )
        self.console.say(f"best     {chosen}")
        return chosen

    def _held_out(self) -> dict[str, float]:
        """The table's figures by the names that a logger groups by: held_out/base/sampled_iou."""
        figures: dict[str, float] = {}
        for arm, label in (("before", "base"), ("after", "adapter")):
            figures |= _for_loggers(label, self.evaluation.get(arm, {}).get("values", {}))
        return figures

    def interrupted(self, reason: Interrupted) -> int:
        """Save what is finished and say how to go on; returns the exit code."""
        self.save_finished()
        lost = self.ranks.missing()
        why = f"{reason}, because rank {lost[0]} is gone without a word" if lost else str(reason)
        if self.saved >= 0 and self.opened:  # else what was asked for is not written down yet
            self.console.warn(
                f"{why}; saved after step {self.saved}; go on with --train.resume auto "
                f"--run.dir {quote(str(self.directory))}"
            )
        else:
            self.console.warn(f"{why} before anything was trained; start again as you did")
        return reason.code

    def save_finished(self) -> None:
        """Before an early end: a checkpoint of the last complete update, where there is none yet.

        Not from an adapter that was being moved, and not over a healthy one while an alarm is on:
        the last good checkpoint then stays the newest. A disk that refuses is said and changes
        nothing.
        """
        if self.learner is None or not self.opened or self.saved == self.done:
            return
        if self.learner.moving or (self.alarmed() and self.saved >= 0):
            newest = f"that of step {self.saved}" if self.saved >= 0 else "none: all is lost"
            self.console.warn(f"the last good checkpoint is {newest}")
            return
        try:
            with contextlib.suppress(EnvironmentFault):  # then the gap is said when the run goes on
                self.write_down()
            self._checkpoint()
            self.console.say(f"saved after step {self.done}")
        except EnvironmentFault as fault:
            self.saved = self._newest()
            if self.saved < self.done:
                self.console.warn(f"what was done since step {max(self.saved, 0)} is lost: {fault}")

    def _newest(self) -> int:
        """The step of the newest checkpoint on disk, -1 where there is none."""
        try:
            newest = checkpoint.latest(self.directory)
        except checkpoint.Corrupt:
            return -1
        return -1 if newest is None else checkpoint.step_of(newest)

    def fall_back(self) -> None:
        """After an alarm ended the run: return to the last healthy checkpoint."""
        assert self.learner is not None
        self.code = ALARMED
        newest = checkpoint.latest(self.directory)
        if newest is None:
            self.console.warn(
                "stopped by an alarm before any healthy checkpoint; the adapter is the unhealthy "
                "one"
            )
            return
        tensors, state = checkpoint.load(newest)
        self.learner.load(tensors, state["learner"])
        self.latest = None
        self.console.warn(
            f"stopped by an alarm; the adapter is the one of step {state['step']}, the last "
            "healthy checkpoint"
        )


class Steps:
    """Takes every finished step of a run."""

    def __init__(self, run: Run, bar: Callable[[Mapping[str, float]], None]) -> None:
        self.run = run
        self.bar = bar
        self.clock = time.monotonic()

    def advance(self, metrics: Mapping, slices: list[Played]) -> None:
        """One more complete update: a line of metrics, the live figures, alarms, samples."""
        run = self.run
        run.done += 1
        record = {"step": run.done, **metrics, **self._speed()}
        said = run.alarms.update(run.done, record)
        for name, text in said.items():
            run.console.alarm(name, text)
        record["alarms"] = [name for name, text in said.items() if text]
        self._tell(record, slices)

    def _tell(self, record: dict[str, Any], slices: list[Played]) -> None:
        """On disk, to the loggers, on screen."""
        run = self.run
        run.unwritten.append(partial(run.metrics.write, record))
        last = run.done == run.config.train.steps
        if run.done == 1 or run.done % run.config.run.samples_every == 0 or last:
            self._samples(slices[0])
        run.write_down()
        run.loggers.log(run.done, record)
        self.bar({name: record[name] for name in SHOWN})

    def _speed(self) -> dict[str, float]:
        now = time.monotonic()
        seconds = now - self.clock - self.run.away
        self.clock = now
        self.run.away = 0.0
        return {"seconds": seconds, "images_per_s": self.run.config.train.batch / seconds}

    def _samples(self, played: Played) -> None:
        """The first images of the batch with everything said about them, for the report."""
        run = self.run
        for index in range(min(SAMPLES, len(played.images))):
            name = f"samples/step_{run.done}_{index}.png"
            picture = io.BytesIO()
            PIL.Image.fromarray(played.images[index].pixels.numpy()).save(picture, "PNG")
            line = {"step": run.done, "image": name, **sample(played, index)}
            run.unwritten.append(partial(files.write, run.directory / name, picture.getvalue()))
            run.unwritten.append(partial(run.samples.write, line))


def alarms_of(config: Config) -> Alarms:
    """Before any step."""
    quantised = config.model.quant != "none"
    return Alarms(config.update.tau, GAP_LIMIT_QUANTISED if quantised else GAP_LIMIT)


def _read(path: Path) -> tuple[checkpoint.Tensors, dict[str, Any]] | checkpoint.Corrupt:
    """A checkpoint, or why it is none: ranks that do not read it are told either."""
    try:
        return checkpoint.load(path)
    except checkpoint.Corrupt as fault:
        return fault


def _for_loggers(arm: str, values: Mapping[str, float]) -> dict[str, float]:
    """The short table's figures, as a logger groups them."""
    return {f"held_out/{arm}/{name}": values[name] for name in BRIEF if name in values}


def _counted(data: Mapping) -> str:
    return f"{data.get('images', 'drawn')} images"
