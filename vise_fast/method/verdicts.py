"""What the judge says about the ghosts of the sampled boxes: the box hidden, a box of its size
hidden elsewhere (control), all but the box hidden (keep).

One verdict per distinct (image, box). Three settings ask less: under `reward.settled` a box whose
ghost hides nothing is not asked about further; under `reward.shared_controls` the boxes of an image
share a control; under `reward.implied` a box that contains one whose ghost hides, hides too, and a
box within one whose ghost does not, does not. Left out: what the verdicts are worth (rewards.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vise_fast.images import geometry, views
from vise_fast.images.geometry import Box
from vise_fast.method import roles
from vise_fast.method.slices import Slice
from vise_fast.method.step_plan import GhostKind

GHOSTS_AT_ONCE = 8
"""Ghosts encoded and judged together, per image of the slice: bounds their memory as the
micro-batch does everything else's.
"""

SURE = 0.9
"""A verdict from this probability on, of yes or of no, implies others (`reward.implied`)."""


@dataclass(frozen=True)
class Hidden:
    """The distinct (image, box) pairs whose ghosts are judged, and the rows that share them.

    rows: rows of the slice's boxes that are judged; slot: the pair of each; image, box_1000 (pairs,
    4) and first (the row whose draw places the pair's control) per pair.
    """

    rows: list[int]
    slot: list[int]
    image: list[int]
    box_1000: Tensor
    first: list[int]


@dataclass
class Verdicts:
    """p(visible) of each box's ghosts by kind, (N,) float64, zeros where `judged` (N,) is False;
    further (N,): control and keep were asked for as well, else they are zeros too.
    """

    judged: Tensor
    further: Tensor
    p: dict[str, Tensor]


class _Request(NamedTuple):
    """Ghosts of one kind to judge: of the pairs `of`, hiding (or keeping) box_1000; `stands` says
    for each pair that wants to know which of these verdicts is its own.
    """

    kind: GhostKind
    of: list[int]
    box_1000: Tensor
    stands: list[int]


class _Spot(NamedTuple):
    """Where a control lies, and whether it is clear of the box."""

    box_1000: Box
    clear: bool


def judge(
    part: Slice,
    queries: roles.Queries,
    boxes: roles.Boxes,
    seen: Tensor,
    among: Tensor | None = None,
) -> Verdicts:
    """p(visible) with the box ghosted, with controls ghosted, with all else ghosted: one verdict
    per distinct (image, box). seen: p(visible) (images,) on the images themselves.

    Nothing is asked about images whose object is not seen anyway or that are not `among` (images,)
    bool (None: all are), unreadable boxes and rewards that do not read the answer: zeros.
    """
    hidden = _hidden(part, queries, boxes, seen, among)
    names = [kind.name for kind in part.plan.kinds]
    count = len(part.pixels) * part.plan.samples
    judged = torch.zeros(count, dtype=torch.bool)
    judged[hidden.rows] = True
    further = torch.zeros(count, dtype=torch.bool)
    table = torch.zeros(len(names), count, dtype=torch.float64)
    if hidden.rows:
        with part.engine.clock.phase("verify"):
            p, asked = _in_rounds(part, hidden, queries.texts, seen)
        table[:, hidden.rows] = p[:, hidden.slot]
        further[hidden.rows] = asked[hidden.slot]
    return Verdicts(judged, further, dict(zip(names, table, strict=True)))


def _hidden(
    part: Slice,
    queries: roles.Queries,
    boxes: roles.Boxes,
    seen: Tensor,
    among: Tensor | None = None,
) -> Hidden:
    """What there is to judge."""
    samples = part.plan.samples
    count = len(part.pixels) * samples
    box_1000 = boxes.box_1000[:count]
    worth = (seen >= part.config.reward.gate) & torch.tensor(queries.readable)
    if among is not None:
        worth = worth & among
    judged = boxes.readable[:count] & geometry.proper(box_1000)
    judged = judged & worth.repeat_interleave(samples)
    rows = judged.nonzero()[:, 0].tolist() if part.plan.judges_ghosts else []
    slots: dict[tuple, int] = {}
    slot = []
    first = []
    for row in rows:
        pair = (row // samples, *box_1000[row].tolist())
        if pair not in slots:
            slots[pair] = len(slots)
            first.append(row)
        slot.append(slots[pair])
    return Hidden(rows, slot, [row // samples for row in first], box_1000[first], first)


def _in_rounds(
    part: Slice, hidden: Hidden, queries: list[str], seen: Tensor
) -> tuple[Tensor, Tensor]:
    """p(visible) (kinds, pairs), zeros where nothing was asked, and the pairs (pairs,) bool that
    were asked about every kind.

    With `reward.settled` or `reward.implied` the boxes themselves are hidden first, and a pair
    whose ghost hides no more than `settled` is not asked about again.
    """
    reward = part.config.reward
    kinds = part.plan.kinds
    every = torch.arange(len(hidden.first))
    if reward.settled == 0 and reward.implied == 0:
        whole = torch.stack(_verdicts(part, hidden, queries, _requests(part, hidden, kinds, every)))
        return whole, torch.ones(len(every), dtype=torch.bool)
    p = torch.zeros(len(kinds), len(every), dtype=torch.float64)
    p[0] = _gone(part, hidden, queries)
    further = seen[hidden.image].double() * (1 - p[0]) > reward.settled
    which = every[further]
    requests = _requests(part, hidden, kinds[1:], which)
    for n, verdicts in enumerate(_verdicts(part, hidden, queries, requests), start=1):
        p[n, which] = verdicts
    return p, further


def _gone(part: Slice, hidden: Hidden, queries: list[str]) -> Tensor:
    """p(visible) (pairs,) with each pair's box hidden. Under `reward.implied` one box of every
    image is asked about at a time, the one of middle size among those still open.
    """
    share = part.config.reward.implied
    count = len(hidden.first)
    p = torch.zeros(count, dtype=torch.float64)
    asked = torch.zeros(count, dtype=torch.bool)
    open_ = torch.ones(count, dtype=torch.bool)
    area = geometry.area_share(hidden.box_1000)
    while open_.any():
        which = torch.arange(count) if share == 0 else _middles(hidden.image, area, open_)
        request = _request(part, hidden, part.plan.kinds[0], which.tolist())
        (p[which],) = _verdicts(part, hidden, queries, [request])
        asked[which] = True
        open_[which] = False
        source = implied_by(torch.tensor(hidden.image), hidden.box_1000, p, asked, share)
        taken = open_ & (source >= 0)
        p[taken] = p[source[taken]]
        open_ &= ~taken
    return p


def _middles(image: list[int], area: Tensor, open_: Tensor) -> Tensor:
    """The open pair of middle area of every image that has one."""
    groups: dict[int, list[int]] = {}
    for pair in open_.nonzero()[:, 0].tolist():
        groups.setdefault(image[pair], []).append(pair)
    ordered = [sorted(pairs, key=lambda pair: float(area[pair])) for pairs in groups.values()]
    return torch.tensor([pairs[len(pairs) // 2] for pairs in ordered])


def implied_by(image: Tensor, box_1000: Tensor, p: Tensor, asked: Tensor, share: float) -> Tensor:
    """For each pair, the first asked pair of its image whose verdict is its own too; -1: none.
    image, p, asked (pairs,); box_1000 (pairs, 4) with area.

    Hiding more hides more: a box that contains `share` of the area of a box whose ghost surely
    hides, and a box of whose own area `share` lies in one whose ghost surely does not.
    """
    low = torch.maximum(box_1000[:, None, :2], box_1000[None, :, :2])
    high = torch.minimum(box_1000[:, None, 2:], box_1000[None, :, 2:])
    common = (high - low).clamp_min(0).prod(-1)
    area = (box_1000[:, 2:] - box_1000[:, :2]).prod(-1)
    contains = (common >= share * area[None]) & (asked & (p <= 1 - SURE))[None]
    within = (common >= share * area[:, None]) & (asked & (p >= SURE))[None]
    implies = (contains | within) & (image[:, None] == image[None]) & (share > 0)
    first = implies.int().argmax(1)
    return torch.where(implies.any(1), first, -1)


def _requests(
    part: Slice, hidden: Hidden, kinds: Sequence[GhostKind], which: Tensor
) -> list[_Request]:
    """Those of some kinds for the pairs `which`; none where there is no pair."""
    pairs = which.tolist()
    if not pairs:
        return []
    return [_request(part, hidden, kind, pairs) for kind in kinds]


def _request(part: Slice, hidden: Hidden, kind: GhostKind, pairs: list[int]) -> _Request:
    if kind.control is None:
        return _Request(kind, pairs, hidden.box_1000[pairs], list(range(len(pairs))))
    spots = [_spot(part, hidden, f"control{kind.control}", pair) for pair in pairs]
    stands = list(range(len(pairs)))
    if part.config.reward.shared_controls:
        clear = [spot.clear for spot in spots]
        stands = _representatives([hidden.image[pair] for pair in pairs], clear)
    chosen = sorted(set(stands))
    placed = torch.tensor([spots[n].box_1000 for n in chosen], dtype=torch.float64)
    place = {n: i for i, n in enumerate(chosen)}
    return _Request(kind, [pairs[n] for n in chosen], placed, [place[n] for n in stands])


def _representatives(image: list[int], clear: list[bool]) -> list[int]:
    """Whose control each pair takes: the first clear one of its image; its own where its control
    cannot be clear of it (the full image has no elsewhere, and must keep a control like its ghost).
    """
    first: dict[int, int] = {}
    for n, (owner, is_clear) in enumerate(zip(image, clear, strict=True)):
        if is_clear:
            first.setdefault(owner, n)
    return [first[image[n]] if is_clear else n for n, is_clear in enumerate(clear)]


def _spot(part: Slice, hidden: Hidden, purpose: str, pair: int) -> _Spot:
    """A box of the same size elsewhere."""
    rng = part.draws.generator(purpose, hidden.first[pair], part.plan.samples)
    box, kind = views.control_box(rng, hidden.box_1000[pair])
    return _Spot(box, kind == "far")


def _verdicts(
    part: Slice, hidden: Hidden, queries: list[str], requests: list[_Request]
) -> list[Tensor]:
    """p(visible) float64 of each request, one per pair that wants to know; so many ghosts in memory
    at a time.
    """
    engine = part.engine
    ghosts: list[Tensor] = []
    texts: list[str] = []
    for request in requests:
        ghosts += _ghosts(part, hidden, request)
        texts += [queries[hidden.image[pair]] for pair in request.of]
    at_once = GHOSTS_AT_ONCE * len(part.pixels)
    found = []
    for start in range(0, len(ghosts), at_once):
        cut = slice(start, start + at_once)
        features = engine.encode(ghosts[cut])
        policy = part.plan.policy_judges
        found.append(roles.verify(engine, features, texts[cut], policy, stay=True))
    if not found:
        return []
    pieces = engine.home(torch.cat(found)).split([len(request.of) for request in requests])
    return [p[request.stands] for request, p in zip(requests, pieces, strict=True)]


def _ghosts(part: Slice, hidden: Hidden, request: _Request) -> list[Tensor]:
    """The images with each pair's box, its control, or all but its box hidden."""
    owner = torch.tensor([hidden.image[pair] for pair in request.of])
    ghost = part.config.ghost
    literal = part.config.view.literal_pixels
    region = request.kind.region
    return views.ghost(part.pixels, owner, request.box_1000, ghost, region, literal=literal)
