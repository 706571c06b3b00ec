"""What a run says and writes down of itself at its start: what runs on what."""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import vise_kernels

from vise_fast import __version__
from vise_fast.config.schema import Config
from vise_fast.engine.choose import engine_of
from vise_fast.images.sources import Source
from vise_fast.model import quantise
from vise_fast.model.families import FAMILIES, row_of
from vise_fast.model.load import Policy, check_targets, known_shapes, resolve
from vise_fast.model.saved import side_files
from vise_fast.ranks.part import part
from vise_fast.ranks.ranks import Ranks
from vise_fast.system.console import counted


def opening_lines(directory: Path, config: Config, policy: Policy, source: Source) -> Iterator[str]:
    """The lines on screen, each within 80 columns where names are short."""
    train = config.train
    yield (
        f"run      {directory}  (preset {config.reward.preset}, "
        f"{counted(train.steps, 'update')} of {counted(train.batch, 'image')})"
    )
    yield (
        f"model    {config.model.path}: {_count(policy, False) / 1e6:.1f} M frozen parameters, "
        f"{_count(policy, True) / 1e6:.2f} M trained in {check_targets(policy.model)} LoRA tensors"
    )
    yield f"data     {source.describe()}"
    yield from few_pictures(config, source)
    paths = Counter(path for path, _ in vise_kernels.available().values())
    kernels = ", ".join(f"{count} {path}" for path, count in paths.most_common())
    dtype = str(policy.backbone.dtype).removeprefix("torch.")
    yield f"device   {policy.device}, {dtype}; kernels: {kernels} (--verbose names them)"
    choice = engine_of(config, row_of(policy.model))
    yield f"engine   {choice.path}: {choice.reason}"


def few_pictures(config: Config, source: Source) -> Iterator[str]:
    """A line where an update has more images than there are pictures to train on."""
    counted_before = not config.data.is_drawn and not config.data.stream
    if counted_before and (found := len(source.sizes())) < config.train.batch:
        yield (
            f"data     {counted(found, 'picture')} for updates of {config.train.batch}: some come "
            "twice in an update; add more, or lower --train.batch"
        )


def verbose_lines(policy: Policy) -> Iterator[str]:
    """What only those who look for it want to know: every kernel's path, and how is attended."""
    for op, (path, reason) in vise_kernels.available().items():
        yield f"kernel   {op}: {path}, {reason}"
    yield f"attention {policy.attention.path}: {policy.attention.reason}"


def ranks_lines(
    ranks: Ranks, config: Config, policy: Policy, work: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """The lines about the processes that train together; nothing where there is one. work: figures
    of a step, where one was made.
    """
    if ranks.count == 1:
        return
    told = ranks.describe()
    images = [len(part(config.train.batch, rank, ranks.count)) for rank in range(ranks.count)]
    size = 4 * _count(policy, True) / 1e6
    yield (
        f"ranks    {ranks.count} on {told['nodes']} machine(s), {images} images of each batch; "
        f"{size:.1f} MB of gradients per step by {told['gradients_by']}"
    )
    if quantise.slices_matter(config):
        yield "ranks    LLM.int8: their number changes the result; at int8_threshold 0 it does not"
    if work is not None:
        each = work["ranks"]
        rates = ", ".join(f"{rate:.2f}" for rate in each["images_per_s"])
        yield (
            f"ranks    images/s of each {rates} (slowest: rank {work['slowest_rank']}), "
            f"{work['communication_share']:.1%} of the step in communication, peak "
            f"{max(each['peak_gib']):.2f} GiB"
        )


def lacking(config: Config) -> Iterator[str]:
    """A line for every small file that the base lacks, so that the adapter will lack it."""
    source = resolve(config.model.path)
    named = source if not Path(source).is_dir() else config.adapter.base
    row = FAMILIES[known_shapes(config.model.path).model_type]
    return side_files.missing(source, named or "HUB_ID_OF_THE_BASE", row.video)


def _count(policy: Policy, trained: bool) -> int:
    """Parameters, frozen or trained."""
    return sum(p.numel() for p in policy.model.parameters() if p.requires_grad is trained)


def environment(policy: Policy) -> dict:
    """What a result depends on beside configuration and seed."""
    device = policy.device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "vise_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "dtype": str(policy.backbone.dtype),
        "argv": sys.argv[1:],
        "attention": [policy.attention.path, policy.attention.reason],
        "kernels": {op: [path, reason] for op, (path, reason) in vise_kernels.available().items()},
    }
