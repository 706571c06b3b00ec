"""The model card of an adapter: what it is, how it was made, what was measured, how it is used.

Everything in it is true on another machine: no path of this one is written, names stand for places.
`training_settings` is the configuration in that form, which lies beside the card. Left out: the
files themselves (export.py).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vise_fast import __version__
from vise_fast.config import schema
from vise_fast.config.schema import Config
from vise_fast.model.load import resolve
from vise_fast.model.saved import side_files
from vise_fast.text.prompts import Style

TEMPLATE = Path(__file__).parent / "model_card.md"
SETTINGS = "training.yaml"
PLACES = (
    "model.path",
    "lora.init_from",
    "data.dir",
    "prompts.file",
    "reward.plugin",
    "run.dir",
)
"""The settings that are paths on the machine that trained."""
LICENCES = {"nano": "apache-2.0", "Qwen/Qwen3-VL": "apache-2.0"}
"""The licence of bases that are known, by how their name begins."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be in vLLM."""
UNITS = {
    "1000": "Boxes are x1,y1,x2,y2 in thousandths of the image's width and height.",
    "pixels": "Boxes are x1,y1,x2,y2 in pixels of the image as the processor resizes it.",
    "1024": "Boxes are in 1024 bins of the image's width and height, y before x.",
}
"""What the numbers of a box mean, by the space of the prompt style."""
DESCRIBE = {"natural": "Describe this image in one sentence.", "short": "name an object"}
OBJECT = {"natural": "the largest object", "short": "red circle"}


@dataclass(frozen=True)
class Made:
    """What a run knows of itself beside its configuration.

    figures: title -> (base, adapter), with intervals; data: `Source.identity`; chosen: why it is
    this adapter of all that the run passed through, "" for the last.
    """

    figures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    chosen: str = ""


def base_name(config: Config) -> str:
    """What the adapter calls its base: a hub id, else what adapter.base says, else the bare name of
    the base's directory.
    """
    source = resolve(config.model.path)
    if config.adapter.base is not None:
        return config.adapter.base
    return Path(source).resolve().name if Path(source).is_dir() else source


def training_settings(config: Config) -> str:
    """The resolved configuration as YAML, with names instead of paths; what belongs to one start
    of a run (where it lies, what it goes on from) is left at its default.
    """
    defaults = {"train.resume": None, "run.dir": "runs/again"}
    named: dict[str, Any] = {key: _bare(value) for key, value in _paths(config).items()}
    named["data.mix"] = [_bare_part(part) for part in config.data.mix]
    named["run.plugins"] = [_bare(path) for path in config.run.plugins]
    public = schema.with_changes(config, named | defaults | {"model.path": base_name(config)})
    return (
        "# The settings that this adapter was trained with; files and folders by bare names.\n"
        + yaml.safe_dump(public.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    )


def _paths(config: Config) -> dict[str, str]:
    """{dotted key: value} of the settings that are paths and are set."""
    values = config.model_dump()
    found = {key: values[key.split(".")[0]][key.split(".")[1]] for key in PLACES}
    return {key: value for key, value in found.items() if value is not None}


def _bare_part(part: str) -> str:
    """An entry of data.mix, PLACE=WEIGHT."""
    place, _, weight = part.rpartition("=")
    return f"{_bare(place)}={weight}"


def _bare(path: str) -> str:
    if path.startswith("hf:"):  # an address, the same for everybody
        return path
    return Path(path).expanduser().resolve().name


def model_card(config: Config, style: Style, made: Made) -> str:
    """Front matter for the hub, how the adapter was made, measured figures, a snippet that asks
    about an image, the vLLM line, citations.
    """
    base = base_name(config)
    return TEMPLATE.read_text(encoding="utf-8").format(
        front=_front_matter(config, base),
        title="vise_fast's embedded model" if base == "nano" else base,
        base=base,
        literal=json.dumps(base),
        word=shlex.quote(base),
        version=__version__,
        steps=config.train.steps,
        batch=config.train.batch,
        samples=config.rollout.samples,
        preset=config.reward.preset,
        lr=config.train.lr,
        seed=config.train.seed,
        r=config.lora.r,
        targets="language model and projectors" if config.lora.projector else "language model",
        data=_data(config, made.data),
        chosen=f"\n- chosen: {made.chosen}" if made.chosen else "",
        settings=SETTINGS,
        images=_images(config),
        table=_table(made.figures),
        units=UNITS[style.space],
        ask_box=style.ground(OBJECT.get(style.name, OBJECT["natural"])),
        ask_words=DESCRIBE.get(style.name, DESCRIBE["natural"]),
        rank=next((r for r in VLLM_RANKS if r >= config.lora.r), config.lora.r),
        connector=" --enable-tower-connector-lora" if config.lora.projector else "",
        connector_why=_connector(config),
    )


def _front_matter(config: Config, base: str) -> str:
    """The hub's metadata as YAML."""
    content = {
        "library_name": "peft",
        "license": licence(config),
        "base_model": base,
        "base_model_relation": "adapter",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "transformers", "vise", "self-evolution", "visual-grounding"],
    }
    return yaml.safe_dump(content, sort_keys=False).strip()


def licence(config: Config) -> str:
    """What adapter.licence says, else the base's licence where it is known, else 'other'."""
    if config.adapter.licence is not None:
        return config.adapter.licence
    base = base_name(config)
    known = (name for start, name in LICENCES.items() if base.startswith(start))
    return _stated_licence(config) or next(known, "other")


def _stated_licence(config: Config) -> str | None:
    """The licence in the front matter of the base's own card, where that is at hand."""
    home = side_files.home_of(resolve(config.model.path))
    card = None if home is None else home / "README.md"
    if card is None or not card.is_file():
        return None
    head = card.read_text(encoding="utf-8", errors="replace")[:4000]
    found = re.match(r"---\n.*?^license:\s*([\w.-]+)\s*$.*?^---$", head, re.DOTALL | re.MULTILINE)
    return found.group(1) if found else None


def _images(config: Config) -> str:
    """The words that name one's own images in place of those it was trained on."""
    if config.data.mix:
        return " --data.mix '[YOUR_IMAGES=1]'"
    return "" if config.data.is_drawn else " --data.dir YOUR_IMAGES"


def _data(config: Config, data: Mapping[str, Any]) -> str:
    """What it was trained on: how many images and their hash."""
    if config.data.is_drawn:
        size = config.scenes.size
        return f"scenes of {size} x {size} pixels drawn by vise_fast (seed {config.train.seed})"
    if "images" not in data:
        return "a folder of images without labels"
    hashes = data.get("names") or ", ".join(part["names"] for part in data.get("mix", []))
    return f"{data['images']} images without labels (hash over their names and sizes: `{hashes}`)"


def _connector(config: Config) -> str:
    if not config.lora.projector:
        return "The projectors carry no LoRA: vLLM needs no further flag to serve all of it."
    return (
        "Without `--enable-tower-connector-lora` vLLM leaves out the projectors' part of the "
        "update and only warns; to train an adapter without that part: `--lora.projector false`."
    )


def _table(figures: Mapping[str, tuple[str, str]]) -> str:
    """Title -> (base, adapter) as Markdown; nothing where nothing was measured."""
    if not figures:
        return ""
    lines = ["", "## Measured by the run itself, on held-out images", ""]
    lines += ["| | base | adapter (paired difference, 95 % interval) |", "|---|---|---|"]
    lines += [f"| {title} | {before} | {after} |" for title, (before, after) in figures.items()]
    return "\n".join([*lines, ""])
