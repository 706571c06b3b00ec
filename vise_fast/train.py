"""Train a vision-language model on raw images by VISE: `python -m vise_fast.train [--config FILE]
[--section.key value …]`.

Without arguments it trains the embedded nano model on drawn scenes and ends in a before/after
table. Each update plays a batch through the method (method/experience.py) and takes one step, which
first scores the rewards (method/learner.py). What a run leaves behind, and how it ends, is
run/directory.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vise_fast.config import origin, settings
from vise_fast.config.command_line import Syntax
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.estimate import planner as estimate
from vise_fast.images.image import Image
from vise_fast.images.sources import Source, open_source
from vise_fast.method import rewards
from vise_fast.method.experience import Played, Truth, attention_share, play_batch, truth_of
from vise_fast.method.learner import Learner
from vise_fast.model import load as model
from vise_fast.run.directory import Run
from vise_fast.run.dry_run import dry_run
from vise_fast.run.out_of_memory import Halving
from vise_fast.run.resume import refuse_changes, resolve
from vise_fast.system import allocator, console, threads
from vise_fast.system.signals import Interrupted, Signals

SYNTAX = Syntax(
    options={"config": "FILE.yaml", "resume": "auto"}, flags=("dry-run",), settings=origin.SETTINGS
)


def main(words: Sequence[str]) -> int:
    """The command: parse, then train, explain (--dry-run) or help."""
    given = SYNTAX.parse(words)
    if given.help:
        console.Console().say(__doc__ + "\n" + settings.help_text(Config))
        return 0
    threads.settle(console.Console().say)
    stated = origin.stated(given)
    config = origin.from_adapter(origin.configuration(given), stated)
    if "dry-run" in given.flags:
        return dry_run(config)
    return train(config, stated=stated)


def train(
    config: Config, truth: Truth | None = None, stated: Mapping[str, Any] | None = None
) -> int:
    """One run, start to finish. truth: tells true boxes, for a reward that asks for them (None: the
    drawn scenes' own); stated: the settings that were asked for by name (those that differ from
    their defaults): a resumed run takes the others from its own configuration.

    Returns the exit code: 0, or 129/130/143 when a signal ended it after saving.
    """
    start = resolve(config, settings.changed(config) if stated is None else stated)
    rewards.check(start.config.reward, truth is not None or start.config.data.is_drawn)
    allocator.keep_freed_memory()
    with Signals() as stop:
        run = Run(start)
        try:
            whole(run, stop, truth)
        except Interrupted as reason:
            return run.interrupted(reason)
        except BaseException:  # SystemExit too: a reward of the user's may call it
            run.save_finished()
            raise
        finally:
            run.close()
    return 0


def whole(run: Run, stop: Signals, truth: Truth | None) -> None:
    """Load, look at the base, train, look again, export."""
    torch.use_deterministic_algorithms(run.config.train.deterministic)
    with contextlib.closing(fitted_source(run)) as source:
        stop.check()
        policy = model.load(run.config, say=run.console.warn)
        stop.check()
        engine = open_engine(policy, run.config, run.console.warn)
        engine.interrupted = stop.check
        learner = Learner(policy, engine, run.config)
        run.resume(learner)
        run.opening(policy, source)
        stop.check()
        run.before(engine, source)
        loop(run, engine, learner, source, truth or truth_of(source, run.config.reward))
        run.finish(policy, engine, source)
        stop.check()


def loop(run: Run, engine: Engine, learner: Learner, source: Source, truth: Truth | None) -> None:
    """The updates that are still to do."""
    config = run.config
    in_memory = Halving(config, engine, learner, run.console.warn)
    with run.progress() as steps:
        while run.done < config.train.steps:
            images = source.batch(run.done, config.train.batch)
            step = Step(engine, learner, images, config, run.done, truth)
            slices, metrics = in_memory(step)
            work = engine.counters.take() | in_memory.figures() | source.figures()
            steps.advance(metrics | work | {"phases": engine.clock.take()}, slices)
            run.keep()
            engine.interrupted()
            if run.should_stop():
                run.fall_back()
                break


@dataclass(frozen=True)
class Step:
    """One update, which can be done again where memory runs out."""

    engine: Engine
    learner: Learner
    images: list[Image]
    config: Config
    number: int
    truth: Truth | None

    def __call__(self) -> tuple[list[Played], dict]:
        """Play the batch and learn from it: (slices, metrics)."""
        slices = play_batch(self.engine, self.images, self.config, self.number, self.truth)
        attention = attention_share(slices)  # before the adapter moves: it may run out of memory
        return slices, self.learner.learn(slices, self.number) | attention


def fitted_source(run: Run) -> Source:
    """The images; where `memory.budget_gb` is set, the run's configuration becomes the one that
    fits it. Raises MemoryFloor, and ConfigError where a resumed run would become another one.
    """
    config = run.config
    multiple = model.grid_multiple(config.model.path)
    source = open_source(config, multiple, run.directory, run.console.warn)
    if config.memory.budget_gb is None:
        return source
    plan = estimate.plan(config, source)
    run.console.say(str(plan))
    if run.resumed is not None:
        refuse_changes(plan.changes, run.directory)
    run.config = plan.config
    if plan.config.data.max_pixels == config.data.max_pixels:
        return source
    source.close()
    return open_source(plan.config, multiple, run.directory, run.console.warn)


if __name__ == "__main__":
    sys.exit(console.run(main))
