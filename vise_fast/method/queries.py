"""What is asked for on each image: a phrase of the user's own, or what the model names.

Nothing is asked about an image whose phrase is given. Of phrases that are tried the asker says
which it sees, in one prefill of them all and without decoding; the first one is asked for, and
where it sees none, what it names itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vise_fast.config.schema import Config
from vise_fast.engine.rollout import Held
from vise_fast.method import roles
from vise_fast.method.evidence import VISIBLE
from vise_fast.method.roles import Queries, Sampling
from vise_fast.method.slices import Slice
from vise_fast.ranks.ranks import Ranks

if TYPE_CHECKING:
    from vise_fast.method.experience import Played


def ask(part: Slice, prefixes: Held) -> Queries:
    """One query per image; `prefixes` those of the images under whoever asks."""
    words = [image.given for image in part.images] or [None] * len(part.pixels)
    tried = {i: image.tried for i, image in enumerate(part.images) if image.tried}
    if tried:
        for i, phrase in _seen(part, prefixes, tried).items():
            words[i] = phrase
    asked = [i for i, phrase in enumerate(words) if phrase is None]
    if not asked:
        return _given(words)
    rollout = part.config.rollout
    sampling = Sampling(rollout.query_tokens, rollout.temperature)
    seeds = part.draws.keys("ask", len(part.pixels))
    own = roles.ask(part.engine, prefixes, asked, [seeds[i] for i in asked], sampling)
    return own if len(asked) == len(words) else _together(words, asked, own)


def _seen(part: Slice, prefixes: Held, tried: dict[int, tuple[str, ...]]) -> dict[int, str]:
    """The first phrase of each image that is seen there; none where none is."""
    pairs = [(i, phrase) for i, phrases in tried.items() for phrase in phrases]
    owner = [i for i, _ in pairs]
    p = roles.verify_forked(part.engine, prefixes, owner, [phrase for _, phrase in pairs])
    found: dict[int, str] = {}
    for (i, phrase), seen in zip(pairs, roles.finite(p).tolist(), strict=True):
        if seen >= VISIBLE:
            found.setdefault(i, phrase)
    return found


def _given(words: Sequence[str | None]) -> Queries:
    """Phrases as queries: nothing was written, and nothing had to be read."""
    texts = [phrase or "" for phrase in words]
    return Queries(texts, [True] * len(texts), [""] * len(texts), [0] * len(texts))


def _together(words: Sequence[str | None], asked: list[int], own: Queries) -> Queries:
    """Phrases, and at the places `asked` what the model named."""
    found = _given(words)
    for place, i in enumerate(asked):
        found.texts[i] = own.texts[place]
        found.readable[i] = own.readable[place]
        found.written[i] = own.written[place]
        found.lengths[i] = own.lengths[place]
    return found


def share_of_words(slices: Sequence[Played], config: Config, ranks: Ranks) -> dict[str, float]:
    """The batch's figure `own_words`: the share of its images that were asked in the user's words;
    nothing where there are none.
    """
    if config.data.queries is None:
        return {}
    written = [length > 0 for played in slices for length in played.queries.lengths]
    mine = torch.tensor([float(not by_the_model) for by_the_model in written])
    return {"own_words": float(torch.cat(ranks.gather("own words", mine)).mean())}
