"""What a run will need, before it runs: `python -m vise_fast.estimate --config FILE [--section.key
value …]`.

Predicts the peak of a step by component from shapes alone (rehearsal.py), for the image sizes of
the actual folder, and says what would make it fit. With `memory.budget_gb` (a number, or auto: this
machine's) it chooses pixel budget, quantisation, micro-batch, checkpointing and optimizer;
lowmem.py writes presets so. Left out: what torch does not see; `usable` leaves room for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from vise_fast.config import origin, places
from vise_fast.config.command_line import Syntax
from vise_fast.config.schema import Config
from vise_fast.estimate.rehearsal import Lengths, Rehearsed, rehearse
from vise_fast.images import picture_file as decode
from vise_fast.images.sources import Source, open_source
from vise_fast.model import load as model
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, MemoryFloor
from vise_fast.text.prompts import style_for
from vise_fast.text.tokens import Tokens

GIB = 2**30
SYNTAX = Syntax(options={"config": "FILE.yaml", "resume": "auto"}, settings=origin.SETTINGS)
LEANEST = "paged_adamw8bit"
PIXEL_SHARES = (1.0, 0.75, 0.5, 0.25)
CONTEXT = 0.6 * GIB
FRAGMENTS = 0.03
"""Of a card: what CUDA and its libraries take, and what the allocator loses to rounding and
fragments. Allowances, not measurements.
"""


@dataclass
class Plan:
    """A configuration with its predicted peak. `changes`: what was chosen over what was asked for;
    `budget` in bytes, None: unknown.
    """

    config: Config
    rehearsed: Rehearsed
    budget: float | None
    changes: dict[str, object] = field(default_factory=dict)
    advice: dict[str, object] | None = None

    @property
    def fits(self) -> bool:
        return self.budget is None or self.rehearsed.peak <= self.budget

    def __str__(self) -> str:
        r = self.rehearsed
        parts = ", ".join(
            f"{name} {size / GIB:.2f}"
            for name, size in sorted(r.at_peak.items(), key=lambda item: -item[1])
            if size >= 0.01 * r.peak
        )
        lines = [f"memory   peak {r.peak / GIB:.2f} GiB predicted, in phase '{r.busiest}': {parts}"]
        if self.changes:
            lines.append(
                f"memory   chosen to fit {self.budget / GIB:.1f} GiB: {_words(self.changes)}"
            )
        elif self.budget is not None:
            lines.append(
                f"memory   {'fits' if self.fits else 'does NOT fit'} the {self.budget / GIB:.1f} "
                "GiB that can be used here"
            )
        if self.advice is not None:
            lines.append(
                f"memory   would fit with {_words(self.advice)}"
                if self.advice
                else "memory   nothing makes this model fit here; take a smaller one"
            )
        return "\n".join(lines)


def _words(changes: dict[str, object]) -> str:
    return " ".join(
        f"--{key} {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )


class Planner:
    """Predictions for one model and one folder; each configuration is rehearsed once."""

    def __init__(
        self, config: Config, source: Source | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.config = config
        self.device = "cuda" if dtype else model.device_of(config.model.device).type
        self.model_config = known_shapes(config.model.path)
        self.dtype = dtype or model.dtype_of(
            config.model.dtype, model.device_of(config.model.device)
        )
        self.lengths = lengths_of(config, self.model_config)
        self.sizes = _sizes(config, source)
        vision = self.model_config.vision_config
        self.multiple = vision.patch_size * vision.spatial_merge_size
        self._peaks: dict[str, Rehearsed] = {}

    def rehearse(self, config: Config) -> Rehearsed:
        """A step on the largest images of the folder."""
        shrunk = [
            decode.grid_size(h, w, self.multiple, config.data.min_pixels, config.data.max_pixels)
            for h, w in self.sizes
        ]
        largest = sorted(shrunk, key=lambda size: -size[0] * size[1])
        batch = (
            (largest * config.train.batch)[: config.train.batch]
            if len(largest) < config.train.batch
            else largest[: config.train.batch]
        )
        train = config.train
        key = repr(
            (
                config.model,
                config.lora,
                train.micro_batch,
                train.checkpointing,
                train.share_forward,
                config.optim.name,
                batch,
            )
        )
        if key not in self._peaks:
            self._peaks[key] = rehearse(
                config, self.model_config, batch, self.dtype, self.lengths, self.device
            )
        return self._peaks[key]

    def choose(self, budget: float) -> dict[str, object] | None:
        """The changes that make a step fit `budget` bytes, the cheapest in speed and fidelity
        first; None where nothing does.
        """
        fits = lambda base, knobs: (
            self.rehearse(_with(self.config, {**base, **knobs})).peak <= budget
        )
        leanest = _knobs(1, True, LEANEST)
        if not fits(
            {
                "model.quant": "nf4",
                "data.max_pixels": int(PIXEL_SHARES[-1] * self.config.data.max_pixels),
            },
            leanest,
        ):
            return None
        for base in self._bases():
            if not fits(base, leanest):
                continue
            micro = next(
                m for m in self._micro_batches() if m == 1 or fits(base, _knobs(m, True, LEANEST))
            )
            knobs = next(k for k in self._speeds(micro) if fits(base, k))
            return {
                key: value
                for key, value in {**base, **knobs}.items()
                if value != _get(self.config, key)
            }
        return None

    def _bases(self) -> Iterator[dict[str, object]]:
        """Fewer bits before fewer pixels."""
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

    def _speeds(self, micro: int) -> Iterator[dict[str, object]]:
        """At one micro-batch: stored activations before computing layers again, exact moments
        before 8-bit ones, those before paged ones, and the rollout's forward pass kept for the
        update before a second one.
        """
        train = self.config.train
        for checkpointing in dict.fromkeys([train.checkpointing, True]):
            for name in dict.fromkeys([self.config.optim.name, "adamw8bit", LEANEST]):
                for share in (
                    [train.share_forward]
                    if checkpointing
                    else dict.fromkeys([train.share_forward, False])
                ):
                    yield _knobs(micro, checkpointing, name) | {"train.share_forward": share}


def plan(config: Config, source: Source | None = None, dtype: torch.dtype | None = None) -> Plan:
    """The run's prediction; where `memory.budget_gb` is set, the configuration that fits it.

    Raises MemoryFloor where a budget is set and nothing fits it, ConfigError where the model's
    shapes are unknown.
    """
    planner = Planner(config, source, dtype)
    budget = usable(config)
    asked = planner.rehearse(config)
    if asked.peak <= budget:
        return Plan(config, asked, budget)
    changes = planner.choose(budget)
    if config.memory.budget_gb is None:
        return Plan(config, asked, budget, advice=changes or {})
    if changes is None:
        floor = planner.rehearse(_with(config, {"model.quant": "nf4", **_knobs(1, True, LEANEST)}))
        raise MemoryFloor(
            f"{config.model.path} needs {floor.peak / GIB:.1f} GiB at least (nf4, one image at a "
            f"time), of which {budget / GIB:.1f} GiB can be used; "
            f"memory.budget_gb is {config.memory.budget_gb}; take a smaller model, a smaller "
            "data.max_pixels or a larger card"
        )
    chosen = _with(config, changes)
    return Plan(chosen, planner.rehearse(chosen), budget, changes)


def usable(config: Config) -> float:
    """Bytes a step may use: of `memory.budget_gb` (GiB, as cards are sold), or of this machine."""
    asked = config.memory.budget_gb
    device = model.device_of(config.model.device)
    if isinstance(asked, float):
        return asked * GIB * (1 - FRAGMENTS) - CONTEXT
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] * (1 - FRAGMENTS) - CONTEXT
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * (1 - FRAGMENTS) - CONTEXT


def known_shapes(path: str):
    """The model's transformers config; for the published sizes from configs/models where the model
    itself is not at hand.
    """
    file = places.SHAPES / f"{path.rsplit('/', 1)[-1].lower().removesuffix('-instruct')}.json"
    if not Path(path).is_dir() and file.is_file():
        return AutoConfig.from_pretrained(file)
    return model.read_config(path)


def lengths_of(config: Config, model_config) -> Lengths:
    """Tokens of each question, with a query as long as `rollout.query_tokens` allows; without a
    tokenizer at hand, those of `Lengths`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.resolve(config.model.path), local_files_only=True
        )
    except (OSError, ValueError, ConfigError):
        return Lengths()
    tokens = Tokens(
        tokenizer,
        style_for(model_config),
        model_config.text_config.vocab_size,
        model_config.image_token_id,
    )
    style = tokens.style
    query = config.rollout.query_tokens
    return Lengths(
        len(tokens.head),
        len(tokens.tail),
        len(tokens.row(style.ask())),
        len(tokens.row(style.ground(""))) + query,
        len(tokens.verdict_row(style.verify(""))) + query,
    )


def _sizes(config: Config, source: Source | None) -> list[tuple[int, int]]:
    """(height, width) of the images; without a source, drawn scenes or photographs at the pixel
    budget, 4:3.
    """
    if source is not None:
        return source.sizes()
    return [(config.scenes.size, config.scenes.size)] if config.data.dir is None else [(4800, 6400)]


def _knobs(micro_batch: int, checkpointing: bool, optimizer: str) -> dict[str, object]:
    return {
        "train.micro_batch": micro_batch,
        "train.checkpointing": checkpointing,
        "optim.name": optimizer,
    }


def _get(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, changes: dict[str, object]) -> Config:
    """A copy with some settings changed."""
    values = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Config.model_validate(values)


def main(words: Sequence[str]) -> int:
    """The command: predict and explain."""
    given = SYNTAX.parse(words)
    out = console.Console()
    if given.help:
        out.say(__doc__)
        return 0
    config = origin.configuration(given)
    source = None
    if config.data.dir is None or Path(config.data.dir).is_dir():
        source = open_source(config, model.grid_multiple(config.model.path))
    found = plan(config, source)
    phases = [
        [name, *(f"{sum(parts.values()) / GIB:.3f}", f"{parts.get('weights', 0) / GIB:.3f}")]
        for name, parts in found.rehearsed.phases.items()
    ]
    out.table("peak of each phase", ["", "GiB", "of which weights"], phases)
    out.say(str(found))
    return 0 if found.fits else MemoryFloor.code
