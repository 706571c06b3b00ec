"""What an export adds to the card of the adapter it came from, and the card of a merged model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import yaml

from vise_fast.config.schema import Config
from vise_fast.model.saved import card

MERGED = """---
{front}
---
# {base} with a VISE adapter merged in

A plain transformers model: `AutoModelForImageTextToText.from_pretrained(DIR)`. Adapted without
labels by VISE (Visual Invariance Self-Evolution, arXiv 2606.27373) with vise_fast, then merged.
"""


def exported(source: Path, base: str, done: list[str], connector: bool) -> str:
    """The card of an exported adapter: that of its source, where there is one, under the base's
    name, and what was done to it since.
    """
    text = source.read_text(encoding="utf-8") if source.is_file() else f"# Adapter of {base}\n"
    names = {
        r"^(base_model: )().*$": base,
        r"^(BASE = )().*$": json.dumps(base),
        r"^(vllm serve ).*?( --enable-lora)": shlex.quote(base),
    }
    for place, name in names.items():
        literal = name.replace("\\", r"\\")
        text = re.sub(place, rf"\g<1>{literal}\g<2>", text, flags=re.MULTILINE)
    if not connector:
        text = text.replace(" --enable-tower-connector-lora --max", " --max")
    return text.rstrip() + "\n" + history(done)


def merged(config: Config, done: list[str]) -> str:
    """The card of a model with the update in its weights."""
    base = card.base_name(config)
    front = {
        "library_name": "transformers",
        "license": card.licence(config),
        "base_model": base,
        "base_model_relation": "finetune",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vise", "self-evolution", "visual-grounding"],
    }
    text = MERGED.format(front=yaml.safe_dump(front, sort_keys=False).strip(), base=base)
    return text + history(done)


def history(done: list[str]) -> str:
    """A section about what was done, a line each."""
    return "\n## How it was exported\n\n" + "".join(f"- {line}\n" for line in done)
