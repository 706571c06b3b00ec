"""Train a vision-language model on raw images by VISE: `python -m vise_fast.train [--config FILE]
[--section.key value …]`.

Without arguments it trains the embedded nano model on drawn scenes and ends in a before/after
table. Each update plays a batch through the method (method/experience.py) and takes one step, which
first scores the rewards (method/learner.py). What a run leaves behind, and how it ends, is
run/directory.py.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("train")  # before what takes seconds to import

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vise_fast.config import origin, schema, settings
from vise_fast.config.schema import Config
from vise_fast.config.share import share
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.estimate import planner as estimate
from vise_fast.images.image import Image
from vise_fast.images.sources import Source, open_training
from vise_fast.method import consensus, rewards
from vise_fast.method.experience import Played, Truth, attention_share, play_batch, truth_of
from vise_fast.method.learner import Learner
from vise_fast.method.queries import share_of_words
from vise_fast.model import load as model
from vise_fast.ranks.joined import joined
from vise_fast.ranks.ranks import Ranks
from vise_fast.run import interim
from vise_fast.run.agreement import same_inputs, same_settings
from vise_fast.run.directory import Run
from vise_fast.run.dry_run import dry_run
from vise_fast.run.follower import open_run
from vise_fast.run.out_of_memory import Halving
from vise_fast.run.resume import refuse_changes, resolve
from vise_fast.system import console, plugin
from vise_fast.system.machine import allocator, threads
from vise_fast.system.signals import Interrupted, Signals, heard

SYNTAX = commands.syntax("train")


def main(words: Sequence[str]) -> int:
    """The command: parse, then train, explain (--dry-run) or help."""
    given = SYNTAX.parse(words)
    if given.help:
        console.Console().say(commands.page("train", words))
        return 0
    with joined() as ranks:
        screen = console.Console.of_rank(ranks.rank)
        threads.settle(screen.say)
        stated = origin.stated(given)
        config = origin.from_adapter(origin.configuration(given), stated)
        for note in origin.preset_notes(given):
            screen.warn(note)
        if "dry-run" in given.flags:
            return dry_run(config, ranks)
        verbose = "verbose" in given.flags
        return train(config, stated=stated, ranks=ranks, verbose=verbose)


def train(
    config: Config,
    truth: Truth | None = None,
    stated: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
    verbose: bool = False,
) -> int:
    """One run, start to finish. truth: tells true boxes, for a reward that asks for them (None: the
    drawn scenes' own); stated: the settings that were asked for by name (those that differ from
    their defaults): a resumed run takes the others from its own configuration; ranks: the processes
    that train it together (None: those that a launcher started, this one alone where none did);
    verbose: say which kernels run.

    Returns the exit code: 0, 7 where an alarm ended it (`train.stop_on_alarm`), or 129/130/143 when
    a signal ended it after saving.
    """
    if ranks is None:
        with joined() as ranks:
            return train(config, truth, stated, ranks, verbose)
    same_settings(ranks, config)
    said = settings.changed(config) if stated is None else stated
    start = ranks.first(lambda: resolve(config, said))
    for path in start.config.run.plugins:
        plugin.load(path, "run.plugins")  # those of a resumed run, on every rank
    rewards.check(start.config.reward, truth is not None or start.config.data.is_drawn)
    interim.check(start.config.eval)
    allocator.keep_freed_memory()
    with heard() as stop:
        run = open_run(start, ranks, verbose)
        ranks.interrupted = stop.check
        try:
            whole(run, stop, truth)
            ranks.end()
        except Interrupted as reason:
            ranks.leave(reason.code)
            return run.interrupted(reason)
        except BaseException:  # SystemExit too: a reward of the user's may call it
            run.save_finished()
            raise
        finally:
            run.close()
    return run.code


def whole(run: Run, stop: Signals, truth: Truth | None) -> None:
    """Load, look at the base, train, look again, export."""
    torch.use_deterministic_algorithms(run.config.train.deterministic)
    ranks = run.ranks
    ranks.ordered = run.config.train.deterministic
    with contextlib.closing(fitted_source(run)) as source:
        stop.check()
        own = share(run.config, ranks)
        with run.console.working("loading the model"):
            policy = ranks.node_by_node(lambda: model.load(own, say=run.console.warn))
        stop.check()
        consensus.check(own, policy.tokens)
        engine = open_engine(policy, own, run.console.warn)
        engine.interrupted = stop.check
        learner = Learner(policy, engine, own, ranks=ranks)
        same_inputs(ranks, policy, source)
        run.resume(learner)
        run.opening(policy, source)
        stop.check()
        run.before(engine, source)
        loop(run, engine, learner, source, truth or truth_of(source, own.reward))
        run.finish(policy, engine, source)
        stop.check()


def loop(run: Run, engine: Engine, learner: Learner, source: Source, truth: Truth | None) -> None:
    """The updates that are still to do."""
    config = run.config
    part = run.ranks.part(config.train.batch)
    in_memory = Halving(learner.config, engine, learner, run.console.warn)
    with run.progress() as steps:
        run.look(engine, source)  # one that an earlier end left undone
        while run.done < config.train.steps and not run.interim.over:
            images = source.batch(run.done, config.train.batch, part)
            step = Step(engine, learner, images, part.start, run.done, truth)
            slices, metrics = in_memory(step)
            counts = engine.counters.take() | in_memory.figures() | source.figures()
            try:
                work = run.ranks.work(counts, len(images), engine.device)
            except BaseException:  # the update is made, whoever is gone: it counts
                steps.advance(metrics | counts | {"phases": engine.clock.take()}, slices)
                raise
            steps.advance(metrics | work | {"phases": engine.clock.take()}, slices)
            run.look(engine, source)
            run.keep()
            engine.interrupted()
            if run.should_stop():
                run.fall_back()
                break


@dataclass(frozen=True)
class Step:
    """One update, which can be done again where memory runs out. `images`: of the batch those that
    stand behind `before` others.
    """

    engine: Engine
    learner: Learner
    images: list[Image]
    before: int
    number: int
    truth: Truth | None

    def __call__(self) -> tuple[list[Played], dict]:
        """Play the batch and learn from it: (slices, metrics)."""
        learner = self.learner
        slices = play_batch(
            self.engine, self.images, learner.config, self.number, self.truth, self.before
        )
        # before the adapter moves: it may run out of memory
        attention = attention_share(slices, learner.ranks)
        words = share_of_words(slices, learner.config, learner.ranks)
        return slices, learner.learn(slices, self.number) | attention | words


def fitted_source(run: Run) -> Source:
    """The images; where `memory.budget_gb` is set, the run's configuration becomes the one that
    fits it. Raises MemoryFloor, and ConfigError where a resumed run would become another one.
    """
    config = run.config
    multiple = model.grid_multiple(config.model.path)
    ranks = run.ranks
    opened = partial(
        open_training, multiple=multiple, directory=run.log_place, say=run.console.warn
    )
    through = run.console.through
    source = ranks.node_by_node(lambda: opened(config, through=through))
    if config.memory.budget_gb is None:
        return source
    with run.console.working("planning the memory of a step"):
        plan = ranks.first(lambda: estimate.plan(config, source, ranks=ranks.count))
    run.console.say(str(plan))
    if run.resumed is not None:
        refuse_changes(plan.changes, run.directory)
    run.config = schema.with_changes(config, plan.changes)
    if run.config.data.max_pixels == config.data.max_pixels:
        return source
    source.close()
    return ranks.node_by_node(lambda: opened(run.config, through=through))


if __name__ == "__main__":
    sys.exit(console.run(main))
