"""One batch of images played through the method: queries, boxes, boxes in the views, verdicts. What
the rewards and the update need.

Follows the paper's step up to its rewards, in four parts: draw the views; ask and box; judge; pack
the evidence. Each part returns what the next ones need, and what it held besides is freed when it
ends. Every draw is named by (seed, step, purpose, index in the batch), so playing a batch in slices
gives the same experience as playing it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from vise_fast.config.schema import Config, RewardConfig
from vise_fast.engine.attention_meter import image_share
from vise_fast.engine.rollout import Engine, Held
from vise_fast.images import views
from vise_fast.images.image import Image
from vise_fast.images.sources import Source
from vise_fast.method import consensus, queries, rewards, roles
from vise_fast.method.evidence import Evidence
from vise_fast.method.groups.named_again import named_again
from vise_fast.method.roles import Question, Sampling
from vise_fast.method.slices import Draws, Slice
from vise_fast.method.step_plan import StepPlan
from vise_fast.method.verdicts import Verdicts, judge
from vise_fast.ranks.ranks import Ranks
from vise_fast.text import sides

Truth = Callable[[Image, str], tuple[float, float, float, float] | None]
"""The true box of a query on an image: for the oracle's reward, or one of the user's; no other sees
it.
"""


def truth_of(source: Source, config: RewardConfig) -> Truth | None:
    """What tells true boxes; None where the reward asks for none, or the source knows none."""
    return getattr(source, "truth", None) if rewards.wants_truth(config) else None


@dataclass
class Played:
    """A slice of the batch after its rollouts: the evidence, and what scoring the sampled boxes
    needs again.

    `boxes` holds the G answers of each image, then (if they were sampled in one batch) one answer
    per view; `features` the images, then (if asked for) the views.
    """

    images: list[Image]
    views: list[list[views.View]]
    queries: roles.Queries
    boxes: roles.Boxes
    evidence: Evidence
    features: Held
    reference: Held | None
    attention: Tensor | None = None
    """(images,) share of attention on the image while the first box was written, mean over layers;
    on steps that measure it
    """
    rewards: Tensor | None = None
    agreed: consensus.Consensus | None = None
    """(samples,) of this slice, once the learner has scored the batch."""


def play(
    engine: Engine, images: list[Image], config: Config, draws: Draws, truth: Truth | None = None
) -> Played:
    """Draw views; ask and box; judge; pack the evidence."""
    pixels = [image.pixels.to(engine.device, non_blocking=True) for image in images]
    plan = StepPlan.of(config, _can_share(engine, config, pixels))
    part = Slice(engine, config, plan, draws, pixels, images)
    drawn = draw_views(part)
    answers = ask_and_box(part, drawn)
    again = named_again(part, answers.queries, answers.boxes)
    verdicts = judge(part, answers.queries, answers.boxes, answers.seen, again)
    truths = None if truth is None else _truths(truth, images, answers.queries.texts)
    evidence = pack(part, drawn, answers, Judged(verdicts, again), truths)
    return Played(
        images=images,
        views=drawn,
        queries=answers.queries,
        boxes=answers.boxes,
        evidence=evidence,
        features=answers.features,
        reference=answers.reference,
        attention=answers.attention,
    )


def _can_share(engine: Engine, config: Config, pixels: list[Tensor]) -> bool:
    """Whether the update may go on from the rollout's forward pass; `auto`: where it gains."""
    if not engine.keeps_keys or config.train.share_forward is True:
        return engine.keeps_keys
    return engine.gains_by_sharing([(image.shape[0], image.shape[1]) for image in pixels])


def play_batch(
    engine: Engine,
    images: list[Image],
    config: Config,
    step: int,
    truth: Truth | None = None,
    before: int = 0,
) -> list[Played]:
    """The batch in slices of `train.micro_batch` images; what is sampled does not depend on the
    slices. before: images of the batch that another rank plays and that stand before these.
    """
    size = config.train.micro_batch or len(images)
    played = []
    for first in range(0, len(images), size):
        draws = Draws(config.train.seed, step, before + first)
        played.append(play(engine, images[first : first + size], config, draws, truth))
    return played


# ---- the views -----------------------------------------------------------------------------------


def draw_views(part: Slice) -> list[list[views.View]]:
    """K transforms of each image, before any box exists."""
    many = part.plan.views
    drawn = []
    for i, image in enumerate(part.pixels):
        rngs = [part.draws.generator("view", i * many + k, many) for k in range(many)]
        height, width = image.shape[:2]
        drawn.append([views.draw_view(rng, height, width, part.config.view) for rng in rngs])
    return drawn


def _encode(part: Slice, drawn: list[list[views.View]]) -> Held:
    """Features of the images, then of their views."""
    with part.engine.clock.phase("views"):
        sources: list[Tensor] = []
        for image in part.pixels:
            sources += [image] * part.plan.views
        moved = views.apply(sources, list(chain.from_iterable(drawn)))
    with part.engine.clock.phase("encode"):
        return part.engine.encode(part.pixels + moved)


# ---- ask and box ---------------------------------------------------------------------------------


class ViewBoxes(NamedTuple):
    """One answer per view, image-major: box_1000 (views, 4), readable (views,)."""

    box_1000: Tensor
    readable: Tensor


@dataclass
class Answers:
    """What was asked, where it is, and whether the judge sees it: p(visible) (images,) on the CPU.

    features: what the update encodes again; reference: the judge's prefixes, where it is the
    reference and the update has use for them.
    """

    queries: roles.Queries
    boxes: roles.Boxes
    view_boxes: ViewBoxes
    seen: Tensor
    features: Held
    reference: Held | None
    attention: Tensor | None


@dataclass
class StepPrefixes:
    """images: those of the images (and behind them, perhaps, of the views) under the policy; views:
    those that end with the views', under whoever boxes them; rooted: the images' with the graph of
    their forward pass, where the update goes on from it.
    """

    images: Held
    views: Held
    rooted: Held | None


@dataclass
class _Boxed:
    """After the boxes: as `Answers`, before anybody was asked what is visible."""

    queries: roles.Queries
    boxes: roles.Boxes
    view_boxes: ViewBoxes
    features: Held
    judges: Held | None
    attention: Tensor | None


def ask_and_box(part: Slice, drawn: list[list[views.View]]) -> Answers:
    """Everything that is asked about the images and their views themselves."""
    engine = part.engine
    boxed = _ask_and_box(part, drawn)  # from here on no view's prefix or pixels lie about
    with engine.clock.phase("verify"):
        judges = boxed.judges
        if judges is None:
            judges = engine.prefill(boxed.features.select(part.originals), adapters=False)
        seen = roles.verify_forked(engine, judges, part.originals, boxed.queries.texts)
    return Answers(
        boxed.queries,
        boxed.boxes,
        boxed.view_boxes,
        seen,
        boxed.features,
        judges if part.plan.keeps_reference else None,
        boxed.attention,
    )


def _ask_and_box(part: Slice, drawn: list[list[views.View]]) -> _Boxed:
    engine = part.engine
    plan = part.plan
    features = _encode(part, drawn)
    originals = features.select(part.originals)
    with engine.clock.phase("prefill"):
        prefixes = prefill_all(part, features)
    with engine.clock.phase("ask"):
        asked = prefixes.images
        if not plan.policy_asks:
            asked = engine.prefill(originals, adapters=False)
        asked_for = queries.ask(part, asked)
    with engine.clock.phase("ground"):
        boxes, view_boxes = _ground(part, prefixes, asked_for, drawn)
    attention = _attention(part, prefixes.images, boxes)
    kept = features if plan.trains_views else originals
    base = None if plan.policy_asks else asked
    judges = prefixes.images if plan.policy_judges else base
    return _Boxed(asked_for, boxes, view_boxes, kept, judges, attention)


def prefill_all(part: Slice, features: Held) -> StepPrefixes:
    """The prefixes of images and views. `rooted` and its copy without a graph share their keys."""
    plan = part.plan
    count = len(part.pixels)
    total = len(features)
    first = count * plan.trained if plan.shares_forward else 0
    rooted = _prefixes(part, features, range(first), graph=True) if first else None
    # the policy's: of everything where it boxes the views too
    own = range(first, total if plan.policy_boxes_views else count)
    images = None if rooted is None else rooted.detach()
    if own:
        rest = _prefixes(part, features, own)
        images = rest if images is None else images.stack(rest)
    if plan.policy_boxes_views:
        return StepPrefixes(images, images, rooted)
    moved = _prefixes(part, features, range(count, total), adapters=False)
    return StepPrefixes(images, moved, rooted)


def _prefixes(
    part: Slice, features: Held, which: range, *, adapters: bool = True, graph: bool = False
) -> Held:
    """Those of some images and views."""
    return part.engine.prefill(features.select(list(which)), adapters, graph=graph)


def _ground(
    part: Slice, prefixes: StepPrefixes, queries: roles.Queries, drawn: list[list[views.View]]
) -> tuple[roles.Boxes, ViewBoxes]:
    """The boxes that were sampled, and those in the views.

    One batch where one player samples both alike; the views' answers then follow the samples'.
    """
    engine = part.engine
    rollout = part.config.rollout
    asked = _questions(part, queries)
    there = _view_questions(part, queries, drawn, len(prefixes.views))
    rows = len(asked) * part.plan.samples
    if part.plan.one_batch:
        boxes = roles.ground(engine, prefixes.images, asked + there, part.sampling, prefixes.rooted)
        return boxes, ViewBoxes(boxes.box_1000[rows:], boxes.readable[rows:])
    boxes = roles.ground(engine, prefixes.images, asked, part.sampling, prefixes.rooted)
    sampling = Sampling(rollout.box_tokens, rollout.view_temperature)
    found = roles.ground(engine, prefixes.views, there, sampling)
    return boxes, ViewBoxes(found.box_1000, found.readable)


def _questions(part: Slice, queries: roles.Queries) -> list[Question]:
    """One about each image, G seeds each."""
    samples = part.plan.samples
    seeds = part.draws.keys("ground", len(queries.texts) * samples, samples)
    found = []
    for image, text in enumerate(queries.texts):
        start = image * samples
        found.append(Question(image, text, seeds[start : start + samples]))
    return found


def _view_questions(
    part: Slice, queries: roles.Queries, drawn: list[list[views.View]], prefixes: int
) -> list[Question]:
    """One about each view, whose prefixes are the last of so many."""
    texts: list[str] = []
    for query, group in zip(queries.texts, drawn, strict=True):
        texts += [sides.query_for(query, view, part.config.view) for view in group]
    seeds = part.draws.keys("reground", len(texts), part.plan.views)
    first = prefixes - len(texts)
    return [Question(first + n, text, [seeds[n]]) for n, text in enumerate(texts)]


def _attention(part: Slice, prefixes: Held, boxes: roles.Boxes) -> Tensor | None:
    """Share of attention on the image (images,) while the first box was written; None on steps that
    do not measure it.
    """
    every = part.config.train.attention_every
    if not (every > 0 and part.draws.step % every == 0 and part.engine.measures_attention):
        return None
    first = boxes.answers.select([i * part.plan.samples for i in part.originals])
    rows = boxes.rows[: len(part.pixels)]
    return image_share(part.engine, prefixes, part.originals, rows, first).mean(0)


def attention_share(slices: list[Played], ranks: Ranks) -> dict[str, float]:
    """The batch's figure `attention_share`; nothing on steps that did not measure it."""
    measured = [played.attention for played in slices if played.attention is not None]
    if not measured:
        return {}
    whole = torch.cat(ranks.gather("attention", torch.cat(measured)))
    return {"attention_share": float(whole.mean())}


# ---- the evidence --------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What was asked after the boxes; named_again: (images,) bool, None where nobody asked."""

    verdicts: Verdicts
    named_again: Tensor | None


def pack(
    part: Slice,
    drawn: list[list[views.View]],
    answers: Answers,
    judged: Judged,
    truths: Sequence[tuple | None] | None,
) -> Evidence:
    """One row per sampled box, image-major. truths: per image, for the oracle."""
    shape = (len(part.pixels), part.plan.views)
    verdicts = judged.verdicts
    again = judged.named_again
    rows = len(part.pixels) * part.plan.samples
    size = _sizes(part)
    return Evidence(
        box_1000=answers.boxes.box_1000[:rows],
        readable=answers.boxes.readable[:rows],
        view_box_1000=_per_box(part, answers.view_boxes.box_1000.view(*shape, 4)),
        view_readable=_per_box(part, answers.view_boxes.readable.view(shape)),
        view_usable=_usable(part, drawn, answers),
        matrix_px=_per_box(part, views.stack(drawn)),
        height=size.height,
        width=size.width,
        seen=_per_box(part, answers.seen),
        gone=verdicts.p["gone"],
        query_readable=_per_box(part, torch.tensor(answers.queries.readable)),
        group_size=part.plan.samples,
        control=_controls(verdicts),
        keep=verdicts.p.get("keep"),
        judged=verdicts.judged,
        further=verdicts.further,
        named_again=None if again is None else _per_box(part, again),
        truth_1000=None if truths is None else _per_box(part, _table(truths)),
    )


def _per_box(part: Slice, x: Tensor) -> Tensor:
    """(images, ...) to (N, ...): an image's entry for each of its sampled boxes."""
    return x.repeat_interleave(part.plan.samples, 0)


class _Size(NamedTuple):
    """Pixels, (N,) each."""

    height: Tensor
    width: Tensor


def _sizes(part: Slice) -> _Size:
    """Of the image of each sampled box."""
    sizes = torch.tensor([image.shape[:2] for image in part.pixels])
    return _Size(*_per_box(part, sizes).unbind(1))


def _usable(part: Slice, drawn: list[list[views.View]], answers: Answers) -> Tensor:
    """(N, K) bool: views that enter a row's reward."""
    rows: list[list[views.View]] = []
    for group in drawn:
        rows += [group] * part.plan.samples
    box_1000 = answers.boxes.box_1000[: len(rows)]
    sided = _per_box(part, sides.named_in(answers.queries.texts))
    return views.usable(rows, box_1000, sided, *_sizes(part), part.config.view)


def _controls(verdicts: Verdicts) -> Tensor | None:
    """(N, C), or None where the reward has none."""
    columns = [p for name, p in verdicts.p.items() if name.startswith("control")]
    return torch.stack(columns, 1) if columns else None


def _truths(truth: Truth, images: list[Image], queries: list[str]) -> list[tuple | None]:
    """The true box of each image's query."""
    return [truth(image, query) for image, query in zip(images, queries, strict=True)]


def _table(truths: Sequence[tuple | None]) -> Tensor:
    """(images, 4); zeros where there is no truth."""
    return torch.tensor([box or (0.0,) * 4 for box in truths], dtype=torch.float64)
