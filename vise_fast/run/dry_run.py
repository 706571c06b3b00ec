"""`train --dry-run`: say what a run would do and what is missing, then do one real step, save it,
load it back, and give an ETA.

Nothing is left behind: the step runs in a temporary directory. Where weights or images are missing,
the shapes are still explained and the exit code is that of the first thing missing.
"""

from __future__ import annotations

import contextlib
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from vise_fast.config import schema, settings
from vise_fast.config.schema import Config
from vise_fast.config.share import share
from vise_fast.engine.choose import open_engine
from vise_fast.engine.rollout import Engine
from vise_fast.estimate import planner as estimate
from vise_fast.images.sources import Source, open_training
from vise_fast.method import consensus, rewards
from vise_fast.method.experience import play_batch, truth_of
from vise_fast.method.learner import Learner
from vise_fast.model import load as model
from vise_fast.model.saved import export
from vise_fast.probe.measure import measure
from vise_fast.probe.verdict import warnings
from vise_fast.ranks.ranks import Alone, Ranks
from vise_fast.run.agreement import same_inputs, same_settings
from vise_fast.run.opening import few_pictures, lacking, ranks_lines
from vise_fast.system import checkpoint
from vise_fast.system.console import Console, counted, duration
from vise_fast.system.errors import EnvironmentFault, UserError

T = TypeVar("T")
TOGETHER = "\xa0"
"""Between a setting and its value, so that a line ends behind both."""
PROBED = 24


def dry_run(config: Config, ranks: Ranks | None = None) -> int:
    """Explain, then try, all ranks together. Returns the exit code: 0, or that of the first
    fault.
    """
    ranks = ranks or Alone()
    console = Console.of_rank(ranks.rank)
    same_settings(ranks, config)
    share(config, ranks)
    rewards.check(config.reward, truth=config.data.is_drawn)
    explain(console, config)
    faults: list[UserError] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = _try(faults, lambda: ranks.agreed(lambda: _open(config, Path(scratch), console)))
        if source is not None:
            console.say(f"data     {source.describe()}")
            for line in few_pictures(config, source):
                console.say(line)
        with console.working("planning the memory of a step"):
            plan = _try(
                faults,
                lambda: ranks.agreed(lambda: estimate.plan(config, source, ranks=ranks.count)),
            )
        if plan is not None:
            console.say(str(plan))
            config = schema.with_changes(config, plan.changes)  # what fits, where a budget is set
        policy = _try(
            faults, lambda: ranks.node_by_node(lambda: _load(share(config, ranks), console))
        )
        if policy is not None and source is not None:
            same_inputs(ranks, policy, source)
            with contextlib.closing(source):
                _try_out(_Trial(console, config, ranks, Path(scratch)), policy, source)
        for line in lacking(config) if policy is not None else ():
            console.warn(line)
    for fault in faults:
        Console().error(fault)
    return faults[0].code if faults else 0


def _try(faults: list[UserError], work: Callable[[], T]) -> T | None:
    """What `work` returns; None where it fails, and the fault is noted."""
    try:
        return work()
    except UserError as fault:
        faults.append(fault)
        return None


def _open(config: Config, scratch: Path, console: Console) -> Source:
    multiple = model.grid_multiple(config.model.path)
    return open_training(config, multiple, scratch, console.warn, console.through)


def explain(console: Console, config: Config) -> None:
    """The run in sentences, and every setting that differs from its default."""
    train = config.train
    rollout = config.rollout
    update = config.update
    console.say(
        f"This run would train LoRA (rank {config.lora.r}) on {config.model.path}, preset "
        f"{config.reward.preset}, into {config.run.dir}:"
    )
    console.say(
        f"  {counted(train.steps, 'update')} of {counted(train.batch, 'image')}; "
        f"{rollout.samples} box{'es' * (rollout.samples != 1)} and "
        f"{counted(rollout.views, 'view')} per image; learning rate {train.lr:g}, "
        f"{train.schedule} after {counted(train.warmup, 'warm-up step')}"
    )
    console.say(
        f"  reward {config.reward.name} ({config.reward.sem}, judged by the "
        f"{config.reward.judge}); advantage {update.advantage}; KL {update.kl}, target "
        f"{update.tau:g} nat per token"
    )
    changed = settings.changed(config)
    if changed:
        listed = ", ".join(f"{key}{TOGETHER}{value}" for key, value in changed.items())
        said = f"settings that differ from their defaults: {listed}"
        lines = textwrap.wrap(said, 76, break_long_words=False, break_on_hyphens=False)
        console.say("\n".join(f"  {line}" for line in lines).replace(TOGETHER, " "))


def _load(config: Config, console: Console) -> model.Policy:
    """The policy, if no download is needed for it: a dry run does not start one."""
    if not model.at_hand(config.model.path):
        raise EnvironmentFault(
            f"the weights of {config.model.path} are not on this machine; a run would download "
            f"them; fetch them with: hf download {config.model.path}"
        )
    with console.working("loading the model"):
        return model.load(config, say=console.warn)


@dataclass(frozen=True)
class _Trial:
    """Who tries what: the run's configuration, and a folder that is removed again."""

    console: Console
    config: Config
    ranks: Ranks
    scratch: Path


def _try_out(trial: _Trial, policy: model.Policy, source: Source) -> None:
    """Two updates (the first one warms up), a checkpoint and an adapter written and read back."""
    console = trial.console
    config = trial.config
    consensus.check(config, policy.tokens)
    engine = open_engine(policy, share(config, trial.ranks), console.warn)
    if trial.ranks.rank == 0:
        _probe(console, config, engine, source)
    learner = Learner(policy, engine, share(config, trial.ranks), ranks=trial.ranks)
    _update(learner, source, config, 0)
    trial.ranks.work({}, 0, engine.device)
    start = time.monotonic()
    metrics = _update(learner, source, config, 1)
    seconds = time.monotonic() - start
    work = trial.ranks.work({}, len(trial.ranks.part(config.train.batch)), engine.device)
    for line in ranks_lines(trial.ranks, config, policy, work):
        console.say(line)
    scratch = trial.scratch
    console.say(
        f"step     reward {metrics['reward']:.3f}, readable answers {metrics['parse_rate']:.0%}, "
        f"KL {metrics['kl']:.2g}, {seconds:.1f} s"
    )
    saved = "bit for bit" if _comes_back(learner, scratch) else "WITH DIFFERENCES"
    adapter = export.export(policy, config, scratch / "adapter")
    size = sum(file.stat().st_size for file in adapter.iterdir())
    console.say(f"save     checkpoint written and read back {saved}; adapter {size / 1e6:.1f} MB")
    console.say(
        f"ETA      {duration(seconds * config.train.steps)} for "
        f"{counted(config.train.steps, 'update')}, evaluation not counted"
    )


def _probe(console: Console, config: Config, engine: Engine, source: Source) -> None:
    """What the base answers on a few of the pictures, and whether that can be trained on."""
    style = engine.tokens.style
    found = measure(engine, source.batch(0, PROBED), config, style)
    console.say(
        f"probe    style {style.name}, {found.pictures} pictures: readable queries "
        f"{found.readable_queries:.0%}, boxes {found.readable_boxes:.0%}, agreement across a view "
        f"{found.agreement:.2f}, p(visible) with the box hidden {found.hidden:.2f}, with another "
        f"{found.elsewhere:.2f}"
    )
    for line in warnings(found):
        console.warn(line)


def _update(learner: Learner, source: Source, config: Config, step: int) -> Mapping[str, float]:
    part = learner.ranks.part(config.train.batch)
    images = source.batch(step, config.train.batch, part)
    truth = truth_of(source, config.reward)
    slices = play_batch(learner.engine, images, learner.config, step, truth, part.start)
    return learner.learn(slices, step)


def _comes_back(learner: Learner, scratch: Path) -> bool:
    """Whether a checkpoint holds bit for bit what was saved."""
    tensors, state = learner.state()
    path = checkpoint.save(scratch, 2, tensors, {"learner": state}, keep=1)
    loaded, _ = checkpoint.load(path)
    return all(_equal(group, loaded[name]) for name, group in tensors.items())


def _equal(saved: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value.cpu(), loaded[name]) for name, value in saved.items())
