"""Do the words come back? Whoever asks (`rollout.asker`) names the object in the cutout of a
group's boxes, greedily; where it does not say what the group was asked for, words and boxes are not
about one thing, and the group carries no gradient (`reward.unique`).

An image without a box that has area has nothing to name: its words do not come back. Left out: what
the group loses by it (method/rewards.py).

Run: `pytest tests/method/groups/test_named_again.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vise_fast.images import geometry
from vise_fast.method import roles
from vise_fast.method.groups import cutout
from vise_fast.method.roles import Boxes, Queries, Sampling
from vise_fast.method.slices import Slice
from vise_fast.model.families import FAMILIES
from vise_fast.text.same_words import same_words


def named_again(part: Slice, queries: Queries, boxes: Boxes) -> Tensor | None:
    """(images,) bool on the CPU: whether the words come back; None where nobody wants to know.

    `boxes` begin with the samples of the slice's images.
    """
    if not part.plan.names_again:
        return None
    group = part.plan.samples
    box_1000 = boxes.box_1000[: len(part.pixels) * group]
    usable = boxes.readable[: len(box_1000)] & geometry.proper(box_1000)
    asked = usable.view(-1, group).any(1) & torch.tensor(queries.readable)
    found = torch.zeros(len(part.pixels), dtype=torch.bool)
    images = asked.nonzero()[:, 0].tolist()
    if images:
        median = cutout.median_boxes(box_1000, usable, group)
        names = _names(part, images, median[images])
        pairs = zip(images, names, strict=True)
        found[images] = torch.tensor([same_words(queries.texts[i], name) for i, name in pairs])
    return found


def _names(part: Slice, images: list[int], boxes_1000: Tensor) -> list[str]:
    """What the asker names in the cutout of each of these images."""
    engine = part.engine
    model = engine.backbone.config
    multiple = FAMILIES[model.model_type].multiple(model)
    pixels = [part.pixels[i] for i in images]
    with engine.clock.phase("ask"):
        features = engine.encode(cutout.cutouts(pixels, boxes_1000, multiple))
        prefixes = engine.prefill(features, adapters=part.plan.policy_asks)
        greedy = Sampling(part.config.rollout.query_tokens, 0.0)
        own = list(range(len(images)))
        named = roles.ask(engine, prefixes, own, [0] * len(own), greedy)
    # an answer that cannot be read names nothing, not the stand-in
    pairs = zip(named.texts, named.readable, strict=True)
    return [text if readable else "" for text, readable in pairs]
