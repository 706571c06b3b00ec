"""`train --dry-run`: say what a run would do and what is missing, then do one real step, save it,
load it back, and give an ETA.

Nothing is left behind: the step runs in a temporary directory. Where weights or images are missing,
the shapes are still explained and the exit code is that of the first thing missing.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

import torch

from vise_fast.config import settings
from vise_fast.config.schema import Config
from vise_fast.engine.choose import open_engine
from vise_fast.estimate import planner as estimate
from vise_fast.images.sources import Source, open_source
from vise_fast.method import rewards
from vise_fast.method.learner import Learner
from vise_fast.model import export as adapter
from vise_fast.model import load as model
from vise_fast.system import checkpoint
from vise_fast.system.console import Console, duration
from vise_fast.system.errors import EnvironmentFault, UserError


def dry_run(config: Config, play_batch) -> int:
    """Explain, then try. Returns the exit code: 0, or that of the first fault."""
    console = Console()
    rewards.resolve(config.reward)
    explain(console, config)
    faults: list[UserError] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = _try(faults, lambda: _open(config, Path(scratch)))
        if source is not None:
            console.say(f"data     {source.describe()}")
        plan = _try(faults, lambda: estimate.plan(config, source))
        if plan is not None:
            console.say(str(plan))
            config = plan.config  # what fits, where a budget is set
        policy = _try(faults, lambda: _load(config))
        if policy is not None and source is not None:
            with contextlib.closing(source):
                _one_step(console, config, policy, source, play_batch, Path(scratch))
    for fault in faults:
        console.error(fault)
    return faults[0].code if faults else 0


def _open(config: Config, scratch: Path) -> Source:
    return open_source(config, model.grid_multiple(config.model.path), scratch)


def explain(console: Console, config: Config) -> None:
    """The run in sentences, and every setting that differs from its default."""
    r = config.rollout
    t = config.train
    u = config.update
    console.say(
        f"This run would train LoRA (rank {config.lora.r}) on {config.model.path}, preset "
        f"{config.reward.preset}, into {config.run.dir}:"
    )
    console.say(
        f"  {t.steps} updates of {t.batch} images; {r.samples} boxes and {r.views} views per "
        f"image; learning rate {t.lr:g}, {t.schedule} after {t.warmup} warm-up steps"
    )
    console.say(
        f"  reward {config.reward.name} ({config.reward.sem}, judged by the "
        f"{config.reward.judge}); advantage {u.advantage}; KL {u.kl}, target {u.tau:g} nat per "
        "token"
    )
    changed = settings.changed(config)
    if changed:
        console.say(
            "  settings that differ from their defaults: "
            + ", ".join(f"{key} {value}" for key, value in changed.items())
        )


def _load(config: Config) -> model.Policy:
    """The policy, if no download is needed for it: a dry run does not start one."""
    if not model.at_hand(config.model.path):
        raise EnvironmentFault(
            f"the weights of {config.model.path} are not on this machine; a run would download "
            f"them; fetch them with: hf download {config.model.path}"
        )
    return model.load(config)


def _try(faults: list[UserError], work):
    try:
        return work()
    except UserError as fault:
        faults.append(fault)
        return None


def _one_step(
    console: Console,
    config: Config,
    policy: model.Policy,
    source: Source,
    play_batch,
    scratch: Path,
) -> None:
    """Two updates (the first one warms up), a checkpoint and an adapter written and read back."""
    engine = open_engine(policy, config)
    learner = Learner(policy, engine, config)
    for step in range(2):
        start = time.monotonic()
        metrics = learner.learn(
            play_batch(engine, source.batch(step, config.train.batch), config, step), step
        )
        seconds = time.monotonic() - start
    console.say(
        f"step     reward {metrics['reward']:.3f}, readable answers {metrics['parse_rate']:.0%}, "
        f"KL {metrics['kl']:.2g}, {seconds:.1f} s"
    )
    tensors, state = learner.state()
    path = checkpoint.save(scratch, 2, tensors, {"learner": state}, keep=1)
    loaded, _ = checkpoint.load(path)
    same = all(
        torch.equal(value.cpu(), loaded[group][name])
        for group, named in tensors.items()
        for name, value in named.items()
    )
    exported = sum(
        f.stat().st_size for f in adapter.export(policy, config, scratch / "adapter").iterdir()
    )
    console.say(
        "save     checkpoint written and read back "
        f"{'bit for bit' if same else 'WITH DIFFERENCES'}; adapter {exported / 1e6:.1f} MB"
    )
    console.say(
        f"ETA      {duration(seconds * config.train.steps)} for {config.train.steps} updates, "
        "evaluation not counted"
    )
