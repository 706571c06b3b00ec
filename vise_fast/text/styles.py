"""Prompt styles by name, and the one that a run asks in: `prompts.ask`, `ground` and `verify` each
name a style; together they are one.

`natural` and `short` are prompts.py's. `json`, `ref`, `box` and `loc` are formats that model
families were trained on; `native` is whichever of them the family's row names, in the numbers it
writes. A style of one's own is an entry of a YAML file (`prompts.file`) with the fields of
prompts.Style, or a call of `register` in a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vise_fast.config.schema import PromptConfig
from vise_fast.system.errors import ConfigError
from vise_fast.text.prompts import NATURAL, SHORT, STYLES, Style

OBJECT = (
    "Pick one object in this image that is clearly visible and easy to tell apart from everything "
    "else. Name it with a short noun phrase that fits this object only, without the words left or "
    "right. "
)
RELATIVE = "whole numbers from 0 to 1000, relative to the width and height of the image"
PIXELS = "whole numbers, in pixels of the image"
VISIBLE = "If it is missing, hidden or blurred beyond recognition, the answer is no. "
JSON = Style(
    name="json",
    ask_text=OBJECT + 'Answer in JSON only: {"object": "your phrase"}',
    ground_text=(
        "Locate {query} in the image. Answer with its bounding box in JSON only: "
        '[{"bbox_2d": [x1, y1, x2, y2]}], '
        + RELATIVE
        + '. If it is not in the image, answer [{"bbox_2d": [0, 0, 0, 0]}]'
    ),
    verify_text=(
        "Is {query} clearly visible in the image? "
        + VISIBLE
        + 'Answer in JSON only: {"visible": "yes"} or {"visible": "no"}'
    ),
    query_form='{"object": "{query}"}',
    box_form='[{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}]',
    verdict_opening='{"visible": "',
    verdict_closing='"}',
    paraphrases=(
        "Can {query} be seen clearly in this image? "
        + VISIBLE
        + 'Answer in JSON only: {"visible": "yes"} or {"visible": "no"}',
    ),
)
REF = replace(
    NATURAL,
    name="ref",
    ask_text=OBJECT + "Answer with exactly one line: <ref>your phrase</ref>",
    ground_text=(
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "<ref>{query}</ref>"
    ),
    query_form="<ref>{query}</ref>",
    box_form="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>",
)
BOX = replace(
    NATURAL,
    name="box",
    ground_text=(
        "Give the bounding box of {query} in the image as "
        "<|box_start|>(x1,y1),(x2,y2)<|box_end|>, " + RELATIVE
    ),
    box_form="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
)
LOC = replace(
    NATURAL,
    name="loc",
    ground_text="detect {query}",
    box_form="<loc{y1}><loc{x1}><loc{y2}><loc{x2}>",
    digits=4,
    largest=1023,
    space="1024",
)
FIELDS = {field.name for field in fields(Style)}
TEXTS = ("ask_text", "ground_text", "verify_text")


class Manner(NamedTuple):
    """How a model is asked by default: its style, and what `native` means for it: a style's name
    and the space of its boxes.
    """

    default: str
    native: str = "json"
    space: str = "1000"


def register(style: Style) -> Style:
    """Makes a style known by its name. Raises ConfigError for a name that is taken."""
    if style.name in STYLES or style.name in ("auto", "native"):
        raise ConfigError(
            f"a prompt style {style.name} is known already; names must differ; rename it"
        )
    STYLES[style.name] = style
    return style


for known in (JSON, REF, BOX, LOC):
    register(known)


def chosen(config: PromptConfig, manner: Manner) -> Style:
    """The style a run asks in. Raises ConfigError for a name or a file that cannot be used."""
    own = {} if config.file is None else read_file(config.file)
    names = [config.ask, config.ground, config.verify]
    if len(own) == 1 and names == ["auto"] * 3:
        names = [*own] * 3
    ask, ground, verify = (_style(name, manner, own) for name in names)
    together = _together(ask, ground, verify)
    if config.system is not None:
        together = replace(together, system=config.system)
    return _worded(together, config.paraphrases)


def _worded(style: Style, wordings: int) -> Style:
    """With so many wordings of the verdict's question in all. Raises ConfigError."""
    if wordings > 1 + len(style.paraphrases):
        raise ConfigError(
            f"prompts.paraphrases {wordings}: style {style.name} has {1 + len(style.paraphrases)} "
            "wordings; write others as paraphrases in prompts.file, or ask for fewer"
        )
    return replace(style, paraphrases=style.paraphrases[: wordings - 1])


def _together(ask: Style, ground: Style, verify: Style) -> Style:
    """Each question from its own style."""
    if ask == ground == verify:
        return ask
    return replace(
        ground,
        name="+".join(style.name for style in (ask, ground, verify)),
        ask_text=ask.ask_text,
        query_form=ask.query_form,
        verify_text=verify.verify_text,
        verdict_opening=verify.verdict_opening,
        verdict_closing=verify.verdict_closing,
        yes=verify.yes,
        no=verify.no,
        paraphrases=verify.paraphrases,
        system=ask.system,
    )


def _style(name: str, manner: Manner, own: Mapping[str, Style]) -> Style:
    if name == "auto":
        name = manner.default
    if name == "native":
        return _native(manner)
    found = own.get(name) or STYLES.get(name)
    if found is None:
        raise ConfigError(
            f"unknown prompt style {name!r}; it is neither shipped nor in prompts.file; use one of "
            f"native, {', '.join([*STYLES, *own])}"
        )
    return found


def _native(manner: Manner) -> Style:
    """The family's format in its own numbers."""
    style = STYLES[manner.native]
    if manner.space != "pixels":
        return replace(style, name="native")
    ground = style.ground_text.replace(RELATIVE, PIXELS)
    return replace(style, name="native", ground_text=ground, space="pixels", largest=10**6)


def read_file(path: str) -> dict[str, Style]:
    """The styles of a YAML file, {name: {field of Style: value}}. Raises ConfigError."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise ConfigError(
            f"prompts.file {path} cannot be read; {str(fault).splitlines()[0]}; give a YAML file "
            "of styles"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"prompts.file {path} holds no styles; it should be a mapping; write NAME: and its "
            "texts below it"
        )
    return {str(name): _from_entry(path, str(name), entry) for name, entry in content.items()}


def _from_entry(path: str, name: str, entry: Any) -> Style:
    """One style; what is not said is natural's."""
    fields_given = dict(entry) if isinstance(entry, dict) else {}
    unknown = sorted(set(map(str, fields_given)) - FIELDS)
    missing = [key for key in TEXTS if not isinstance(fields_given.get(key), str)]
    if unknown or missing:
        what = f"does not know {unknown[0]}" if unknown else f"lacks {missing[0]}"
        raise ConfigError(
            f"prompts.file {path}: style {name} {what}; a style has {', '.join(TEXTS)} and may set "
            f"other fields of vise_fast.text.prompts.Style; correct it"
        )
    for key in ("ground_text", "verify_text"):
        if "{query}" not in fields_given[key]:
            raise ConfigError(
                f"prompts.file {path}: {key} of style {name} has no {{query}}; the model would not "
                "know what is asked for; put it in"
            )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields_given.items()}
    return replace(NATURAL, **values | {"name": name, "paraphrases": values.get("paraphrases", ())})


SHIPPED = (NATURAL, SHORT, JSON, REF, BOX, LOC)
"""For tests and for the probe."""
