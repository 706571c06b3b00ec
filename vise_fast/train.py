"""Train a vision-language model on raw images by VISE: `python -m vise_fast.train [--config FILE]
[--section.key value …]`.

Without arguments it trains the embedded nano model on drawn scenes and ends in a before/after
table. Each update plays a batch through the method (experience.py), turns what happened into
rewards (rewards.py) and takes one step (learner.py). What a run leaves behind is written by run.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

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
from vise_fast.method.experience import Played, Truth, attention_share, play_batch
from vise_fast.method.learner import Learner
from vise_fast.model import load as model
from vise_fast.run.directory import Run
from vise_fast.run.dry_run import dry_run
from vise_fast.run.out_of_memory import Halving
from vise_fast.system import allocator, console
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
    config = origin.configuration(given)
    if "dry-run" in given.flags:
        return dry_run(config, play_batch)
    return train(config)


def train(config: Config, truth: Truth | None = None) -> int:
    """One run, start to finish. Returns the exit code: 0, or 130/143 when a signal ended it after
    saving.
    """
    rewards.resolve(config.reward)
    allocator.keep_freed_memory()
    torch.use_deterministic_algorithms(config.train.deterministic)
    run = Run.begin(config)
    multiple = model.grid_multiple(config.model.path)
    source = open_source(config, multiple, run.directory)
    if config.memory.budget_gb is not None:
        config, source = fitted(config, source, run)
    policy = model.load(config)
    engine = open_engine(policy, config)
    learner = Learner(policy, engine, config)
    in_memory = Halving(config, engine, learner)
    done = run.resume(learner)
    run.opening(policy, source)
    run.before(engine, source)
    with contextlib.closing(source), Signals() as stop:
        engine.interrupted = stop.check
        try:
            with run.progress() as advance:
                for step in range(done, config.train.steps):
                    images = source.batch(step, config.train.batch)
                    slices, metrics = in_memory(
                        lambda images=images, step=step: one_step(
                            engine, learner, images, config, step, truth
                        )
                    )
                    done = step + 1
                    advance(
                        step,
                        metrics
                        | engine.counters.take()
                        | in_memory.figures()
                        | {"phases": engine.clock.take()},
                        slices,
                    )
                    run.keep(done, learner)
                    stop.check()
                    if run.should_stop(done):
                        run.fall_back(learner)
                        break
        except Interrupted as interrupted:
            return run.interrupted(learner, done, interrupted)
        run.finish(policy, engine, source, learner, done)
    return 0


def one_step(
    engine: Engine,
    learner: Learner,
    images: list[Image],
    config: Config,
    step: int,
    truth: Truth | None,
) -> tuple[list[Played], dict]:
    """Play the batch and learn from it: (slices, metrics)."""
    slices = play_batch(engine, images, config, step, truth)
    return slices, learner.learn(slices, step) | attention_share(slices)


def fitted(config: Config, source: Source, run: Run) -> tuple[Config, Source]:
    """What `memory.budget_gb` makes of the configuration, and the source at its pixel budget.

    Raises MemoryFloor.
    """
    plan = estimate.plan(config, source)
    run.console.say(str(plan))
    run.config = plan.config
    if plan.config.data.max_pixels == config.data.max_pixels:
        return plan.config, source
    source.close()
    multiple = model.grid_multiple(config.model.path)
    return plan.config, open_source(plan.config, multiple, run.directory)


if __name__ == "__main__":
    sys.exit(console.run(main))
