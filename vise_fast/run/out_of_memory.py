"""Running out of memory is survivable: the step is done again in slices half as large, with the
same randomness and the same result.

Redoing is safe because nothing of a step outlives it until the optimizer moves the adapter: draws
are named, not consumed, gradients are cleared, and the memory of the move itself is asked for
before it begins (method/learner.py). Slices add up to the same gradient, so halving changes the
result by the order of fp32 sums only; LLM.int8 is the one exception, and says so
(model/quantise.py). What stays halved stays so for the rest of the run. A single image that does
not fit first gives up the activations that its update would have taken over from its rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Engine
from vise_fast.estimate import planner as estimate
from vise_fast.method.learner import Learner
from vise_fast.method.step_plan import StepPlan
from vise_fast.model import quantise
from vise_fast.model.load import silent
from vise_fast.system.errors import MemoryFloor, UserError
from vise_fast.system.machine.memory import exhausted

T = TypeVar("T")


class Halving:
    """Does steps; halves `train.micro_batch` of `config` whenever one does not fit.

    `halvings` counts; `warn` is told, once, where the result depends on the slices.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        learner: Learner,
        warn: Callable[[str], None] = silent,
    ) -> None:
        self.config = config
        self.engine = engine
        self.learner = learner
        self.warn = warn
        self.halvings = 0

    def __call__(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns: a rollout and its update, reading `train.micro_batch` of the
        config. Raises MemoryFloor.
        """
        while True:
            try:
                return attempt()
            except (RuntimeError, MemoryError) as fault:
                if not exhausted(fault):
                    raise
                reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
            # Outside the handler: the traceback, which holds the failed step's tensors, is gone.
            self._halve(reason)

    def figures(self) -> dict[str, int]:
        """For metrics.jsonl."""
        return {
            "memory_halvings": self.halvings,
            "micro_batch": self.config.train.micro_batch or self.config.train.batch,
        }

    def _halve(self, reason: str) -> None:
        """Make the next attempt smaller. Raises MemoryFloor where that cannot help."""
        self._forget()
        size = self.config.train.micro_batch or self.config.train.batch
        if self.learner.moving:
            raise MemoryFloor(
                f"out of memory inside the optimizer step ({reason}); the adapter may be half "
                "moved and is not saved; go on from the last checkpoint where more memory is free, "
                "or start a new run with --optim.name adamw8bit"
            )
        if size > 1:
            self.config.train.micro_batch = size // 2
            self._say_what_changes()
        elif StepPlan.of(self.config, self.engine.keeps_keys).shares_forward:
            self.config.train.share_forward = False
        else:
            raise MemoryFloor(
                f"out of memory with one image at a time ({reason}); {_prediction(self.config)}; "
                "take --model.quant nf4, --train.checkpointing true or fewer --data.max_pixels"
            )
        self.halvings += 1

    def _say_what_changes(self) -> None:
        """The first time, where slices are more than another order of sums."""
        if self.halvings == 0 and quantise.slices_matter(self.config):
            self.warn(
                "out of memory: slices of the batch are halved, and with model.int8_threshold "
                f"{self.config.model.int8_threshold:g} (LLM.int8) that changes what is sampled and "
                "learned; at threshold 0 it does not"
            )

    def _forget(self) -> None:
        """Nothing of the failed step stays, in memory or in the figures."""
        self.engine.counters.take()
        self.engine.clock.take()
        self.learner.forget()
        self.engine.forget()
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()


def _prediction(config: Config) -> str:
    """The estimate in one clause."""
    try:
        planner = estimate.Planner(config)
        rehearsed = planner.rehearse(config)
    except (UserError, MemoryError, torch.OutOfMemoryError) as fault:
        return f"no estimate ({' '.join(str(fault).split())})"
    largest = sorted(rehearsed.at_peak.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / estimate.GIB:.2f}" for name, size in largest)
    return f"predicted {rehearsed.peak / estimate.GIB:.2f} GiB ({parts})"
