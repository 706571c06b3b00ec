"""What a run will need, before it runs: `python -m vise_fast.estimate --config FILE [--section.key
value …]`.

Predicts the peak of a step by component from shapes alone (rehearsal.py), for the image sizes of
the actual folder, and says what would make it fit. With `memory.budget_gb` (a number, or auto: this
machine's) it chooses pixel budget, quantisation, micro-batch, checkpointing and optimizer;
lowmem.py writes presets so. `--ranks N`: of N that train together, one (docs/SCALING.md). Left out:
what torch does not see; `usable` leaves room for it.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vise_fast.config import commands, origin
from vise_fast.config.schema import Config
from vise_fast.config.share import of_one
from vise_fast.estimate import remembered
from vise_fast.estimate.rehearsal import Case, Rehearsed, rehearsed
from vise_fast.images import picture_file
from vise_fast.images.sources import Source, is_here, open_source
from vise_fast.method.step_plan import Lengths
from vise_fast.model import load as model
from vise_fast.model.base import read_tokenizer
from vise_fast.model.families import FAMILIES
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, EnvironmentFault, MemoryFloor
from vise_fast.text.tokens import Tokens

Settings = dict[str, Any]
"""Values by `section.key`."""

GIB = 2**30
SYNTAX = commands.syntax("estimate")
LEANEST = "paged_adamw8bit"
PIXEL_SHARES = (1.0, 0.75, 0.5, 0.25)
CONTEXT = 0.6 * GIB
FRAGMENTS = 0.03
"""Of a card: what CUDA and its libraries take, and what the allocator loses to rounding and
fragments. Allowances, not measurements.
"""


@dataclass
class Plan:
    """A configuration with its predicted peak. `budget`: bytes that can be used; `changes`: what
    was chosen over what was asked for; `advice`: what would make it fit (empty: nothing does);
    `dtype`: of the weights.
    """

    config: Config
    rehearsed: Rehearsed
    budget: float
    changes: Settings = field(default_factory=dict)
    advice: Settings | None = None
    dtype: torch.dtype = torch.float32
    ranks: int = 1

    @property
    def fits(self) -> bool:
        """The predicted peak is within the budget."""
        return self.rehearsed.peak <= self.budget

    def __str__(self) -> str:
        lines = [self._peak(), self._held(), *self._shared(), self._verdict()]
        if self.advice:
            lines.append(f"would fit with {_words(self.advice)}")
        elif self.advice is not None:
            lines.append("nothing makes this model fit here; take a smaller one")
        return "\n".join(f"memory   {line}" for line in lines)

    def _peak(self) -> str:
        r = self.rehearsed
        parts = sorted(r.at_peak.items(), key=lambda part: -part[1])
        large = [f"{name} {size / GIB:.2f}" for name, size in parts if size >= 0.01 * r.peak]
        where = f"in phase '{r.busiest}': {', '.join(large)}"
        return f"peak {r.peak / GIB:.2f} GiB predicted, {where}"

    def _held(self) -> str:
        """How the weights are held."""
        quant = self.config.model.quant
        dtype = str(self.dtype).removeprefix("torch.")
        form = dtype if quant == "none" else f"{quant}, computed in {dtype}"
        return f"weights in {form}; the adapter beside them in float32, unmerged"

    def _shared(self) -> Iterator[str]:
        """What a prediction for several ranks is about."""
        if self.ranks > 1:
            yield (
                f"that is each of {self.ranks} ranks, with {self.config.train.batch} images of a "
                f"batch at most; weights, masters and moments are whole on every one"
            )

    def _verdict(self) -> str:
        room = f"{self.budget / GIB:.1f} GiB"
        if self.changes:
            return f"chosen to fit {room}: {_words(self.changes)}"
        return f"{'fits' if self.fits else 'does NOT fit'} the {room} that can be used here"


def _words(changes: Settings) -> str:
    """As one would type them."""
    words = []
    for key, value in changes.items():
        words.append(f"--{key} {str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


class Planner:
    """Predictions for one model and one folder; each configuration is rehearsed once, and once for
    all planners of this machine (remembered.py). `ranks`: how many train
    together, of which `config` is the share of one.
    """

    def __init__(
        self,
        config: Config,
        source: Source | None = None,
        dtype: torch.dtype | None = None,
        ranks: int = 1,
    ) -> None:
        self.config = config
        self.ranks = ranks
        device = torch.device("cuda") if dtype else model.device_of(config.model.device)
        self.device = device.type
        self.model_config = model.known_shapes(config.model.path)
        self.dtype = dtype or model.dtype_of(config.model.dtype, device)
        self.lengths = lengths_of(config, self.model_config)
        self.sizes = _sizes(config, source)
        self.multiple = FAMILIES[self.model_config.model_type].multiple(self.model_config)
        self._peaks: dict[str, Rehearsed] = {}

    def rehearse(self, config: Config) -> Rehearsed:
        """A step on the largest images of the folder."""
        batch = self._largest(config)
        train = config.train
        speed = (train.micro_batch, train.checkpointing, train.share_forward, config.optim.name)
        key = repr((config.model, config.lora, speed, batch))
        if key not in self._peaks:
            case = Case(config, batch, self.dtype, self.lengths, self.device)
            found = self._remembered(case)
            if self.ranks > 1:  # the sum of everybody's is kept until the optimizer has moved
                parts = found.phases["optimizer"]
                parts["exchanged gradients"] = parts["LoRA masters"]
            self._peaks[key] = found
        return self._peaks[key]

    def _remembered(self, case: Case) -> Rehearsed:
        """From the user's cache where this was asked before."""
        place = remembered.place_of(case, self.model_config)
        found = remembered.read(place)
        if found is None:
            found = rehearsed(case, self.model_config)
            remembered.write(place, found)
        return found

    def _largest(self, config: Config) -> list[tuple[int, int]]:
        """The batch of the folder's largest images as the model would see them, over and over where
        they are few.
        """
        limits = (self.multiple, config.data.min_pixels, config.data.max_pixels)
        shrunk = {size: picture_file.grid_size(*size, *limits) for size in set(self.sizes)}
        largest = heapq.nsmallest(
            config.train.batch,
            map(shrunk.__getitem__, self.sizes),
            key=lambda size: -size[0] * size[1],
        )
        times = -(-config.train.batch // len(largest))
        return (largest * times)[: config.train.batch]

    def choose(self, budget: float) -> Settings | None:
        """The changes that make a step fit `budget` bytes, the cheapest in speed and fidelity
        first; None where nothing does.
        """
        base = self._base(budget)
        if base is None:
            return None
        found = base | self._quickest(base, budget)
        return {key: value for key, value in found.items() if value != _get(self.config, key)}

    def _base(self, budget: float) -> Settings | None:
        """The first base on which the leanest step fits. Whether the last one fits, which needs
        least, is asked only where none of whole images does: a rehearsal takes seconds.
        """
        leanest = _knobs(1, True, LEANEST) | {"model.graphs": False}
        bases = list(self._bases())
        whole = len(bases) // len(PIXEL_SHARES)
        if found := self._first_that_fits(bases[:whole], leanest, budget):
            return found
        if not self._fits(bases[-1] | leanest, budget):
            return None
        return self._first_that_fits(bases[whole:], leanest, budget)

    def _first_that_fits(
        self, bases: list[Settings], leanest: Settings, budget: float
    ) -> Settings | None:
        return next((base for base in bases if self._fits(base | leanest, budget)), None)

    def _fits(self, changes: Settings, budget: float) -> bool:
        return self.rehearse(_with(self.config, changes)).peak <= budget

    def _quickest(self, base: Settings, budget: float) -> Settings:
        """The knobs with which a step on `base` fits, the largest micro-batch first."""
        for micro in self._micro_batches():
            if micro == 1 or self._fits(base | _knobs(micro, True, LEANEST), budget):
                break
        # no rehearsal of other moments where not even those that take least would fit
        possible = (
            knobs
            for knobs in self._speeds(micro)
            if self._fits(base | knobs | {"optim.name": LEANEST}, budget)
        )
        return next(knobs for knobs in possible if self._fits(base | knobs, budget))

    def _bases(self) -> Iterator[Settings]:
        """Fewer bits before fewer pixels; the leanest comes last."""
        kinds = ["none", "int8", "nf4"]
        for share in PIXEL_SHARES:
            for quant in kinds[kinds.index(self.config.model.quant) :]:
                yield {
                    "model.quant": quant,
                    "data.max_pixels": int(share * self.config.data.max_pixels),
                }

    def _micro_batches(self) -> Iterator[int]:
        """Large ones first: a rollout of few rows wastes more time than a second forward pass.

        0 is the whole batch.
        """
        whole = self.config.train.batch
        micro = self.config.train.micro_batch or whole
        while micro >= 1:
            yield 0 if micro == whole > 1 else micro
            micro //= 2

    def _speeds(self, micro: int) -> Iterator[Settings]:
        """At one micro-batch: stored activations before computing layers again, exact moments
        before 8-bit ones, those before paged ones, and the rollout's forward pass kept for the
        update before a second one.
        """
        for graphs in dict.fromkeys([self.config.model.graphs, False]):
            for knobs in self._with_graphs(micro):
                yield knobs | {"model.graphs": graphs}

    def _with_graphs(self, micro: int) -> Iterator[Settings]:
        """The others; what graphed decoding keeps is given up last, for it costs most."""
        train = self.config.train
        for checkpointing in dict.fromkeys([train.checkpointing, True]):
            # a step that computes its layers again shares nothing
            shares = [train.share_forward] if checkpointing else [train.share_forward, False]
            for name in dict.fromkeys([self.config.optim.name, "adamw8bit", LEANEST]):
                for share in dict.fromkeys(shares):
                    yield _knobs(micro, checkpointing, name) | {"train.share_forward": share}


def plan(
    config: Config,
    source: Source | None = None,
    dtype: torch.dtype | None = None,
    ranks: int = 1,
) -> Plan:
    """The run's prediction; where `memory.budget_gb` is set, the configuration that fits it. Of
    several `ranks`, the one with most images.

    Raises MemoryFloor where a budget is set and nothing fits it, ConfigError where the model's
    shapes are unknown.
    """
    config = of_one(config, ranks)
    planner = Planner(config, source, dtype, ranks)
    budget = usable(config, ranks)
    asked = planner.rehearse(config)
    if asked.peak <= budget:
        return Plan(config, asked, budget, dtype=planner.dtype, ranks=ranks)
    changes = planner.choose(budget)
    if config.memory.budget_gb is None:
        advice = changes or {}
        return Plan(config, asked, budget, advice=advice, dtype=planner.dtype, ranks=ranks)
    if changes is None:
        raise _floor(planner, budget)
    chosen = _with(config, changes)
    rehearsed = planner.rehearse(chosen)
    return Plan(chosen, rehearsed, budget, changes, dtype=planner.dtype, ranks=ranks)


def _floor(planner: Planner, budget: float) -> MemoryFloor:
    """What the leanest step would need."""
    config = planner.config
    leanest = _with(config, {"model.quant": "nf4"} | _knobs(1, True, LEANEST))
    need = planner.rehearse(leanest).peak
    return MemoryFloor(
        f"{config.model.path} needs {need / GIB:.1f} GiB at least (nf4, one image at a time), of "
        f"which {budget / GIB:.1f} GiB can be used; memory.budget_gb is "
        f"{config.memory.budget_gb}; take a smaller model, a smaller data.max_pixels or a larger "
        "card"
    )


def usable(config: Config, ranks: int = 1) -> float:
    """Bytes a step may use: of `memory.budget_gb` (GiB, as cards are sold), or of this machine,
    whose host memory its ranks share.

    Raises EnvironmentFault where the machine does not tell.
    """
    asked = config.memory.budget_gb
    device = model.device_of(config.model.device)
    if isinstance(asked, float):
        total = asked * GIB
    elif device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
    else:
        raise EnvironmentFault(
            "this system does not tell how much memory it has; so nothing can be planned for it; "
            "say how much may be used: --memory.budget_gb 16"
        )
    return total * (1 - FRAGMENTS) - CONTEXT


def lengths_of(config: Config, model_config: Any) -> Lengths:
    """Tokens of each question, with a query as long as `rollout.query_tokens` allows; without a
    tokenizer at hand, those of `Lengths`.
    """
    tokens = _tokens_at_hand(config, model_config)
    if tokens is None:
        return Lengths()
    style = tokens.style
    query = config.rollout.query_tokens
    return Lengths(
        head=len(tokens.head),
        tail=len(tokens.tail),
        ask=len(tokens.row(style.ask())),
        ground=len(tokens.row(style.ground(""))) + query,
        verify=len(tokens.verdict_row(style.verify(""))) + query,
    )


def _tokens_at_hand(config: Config, model_config: Any) -> Tokens | None:
    """Nothing is downloaded for them."""
    path = config.model.path
    vocabulary = model_config.text_config.vocab_size
    try:
        source = model.resolve(path)
        tokenizer = read_tokenizer(source, path, vocabulary, local_files_only=True)
    except (ConfigError, EnvironmentFault):
        return None
    return model.tokens_of(config, model_config, tokenizer, vocabulary)


def _sizes(config: Config, source: Source | None) -> list[tuple[int, int]]:
    """(height, width) of the images; without a source, drawn scenes or photographs at the pixel
    budget, 4:3.
    """
    if source is not None:
        return source.sizes()
    return [(config.scenes.size, config.scenes.size)] if config.data.is_drawn else [(4800, 6400)]


def _knobs(micro_batch: int, checkpointing: bool, optimizer: str) -> Settings:
    return {
        "train.micro_batch": micro_batch,
        "train.checkpointing": checkpointing,
        "optim.name": optimizer,
    }


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, changes: Settings) -> Config:
    """A copy with some settings changed."""
    values = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Config.model_validate(values)


def _ranks(text: str | None) -> int:
    """How many cards or processes are meant. Raises ConfigError."""
    if text is None:
        return 1
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"--ranks {text}: not a number of ranks; give 1 or more")
    return int(text)


def main(words: Sequence[str]) -> int:
    """The command: predict and explain."""
    given = SYNTAX.parse(words)
    out = console.Console()
    if given.help:
        out.say(commands.page("estimate", words))
        return 0
    config = origin.configuration(given)
    source = None
    if is_here(config):
        source = open_source(config, model.grid_multiple(config.model.path))
    else:
        places = config.data.dir or ", ".join(config.data.mix)
        out.warn(f"{places} is not here; photographs at the pixel budget, 4:3, are assumed")
    found = plan(config, source, ranks=_ranks(given["ranks"]))
    phases = []
    for name, parts in found.rehearsed.phases.items():
        weights = parts.get("weights", 0)
        phases.append([name, f"{sum(parts.values()) / GIB:.3f}", f"{weights / GIB:.3f}"])
    out.table("peak of each phase", ["", "GiB", "of which weights"], phases)
    out.say(str(found))
    return 0 if found.fits else MemoryFloor.code
