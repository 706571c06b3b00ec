"""Which pictures are left out by the settings, and why: a function of what was measured alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vise_fast.config.schema import DataConfig
from vise_fast.images.curation.measures import Measures
from vise_fast.images.curation.near import originals

LOG = "left_out.jsonl"


def left_out(measured: Mapping[str, Measures], data: DataConfig) -> dict[str, str]:
    """{name: reason}; of pictures that are almost the same, the largest stays, of
    equal ones the first by name.
    """
    found = {}
    for name, measures in measured.items():
        reason = _below(measures, data)
        if reason:
            found[name] = reason
    if data.near_duplicates is not None:
        found |= _near([name for name in measured if name not in found], measured, data)
    return found


def _below(measures: Measures, data: DataConfig) -> str | None:
    if measures.side < data.min_side:
        return f"is small: {measures.side} px, data.min_side is {data.min_side}"
    sharpness = measures.sharpness / 1000
    if sharpness < data.min_sharpness:
        return f"is blurred: sharpness {sharpness:g}, data.min_sharpness is {data.min_sharpness:g}"
    contrast = measures.contrast / 1000
    if contrast < data.min_contrast:
        return f"is flat: contrast {contrast:g}, data.min_contrast is {data.min_contrast:g}"
    return None


def _near(
    names: Sequence[str], measured: Mapping[str, Measures], data: DataConfig
) -> dict[str, str]:
    assert data.near_duplicates is not None
    names = sorted(names, key=lambda name: -measured[name].side)
    first = originals([measured[name].bits for name in names], data.near_duplicates)
    return {
        name: f"is almost {names[other]}"
        for place, (name, other) in enumerate(zip(names, first, strict=True))
        if other != place
    }
