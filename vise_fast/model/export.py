"""The finished adapter as a directory that stands alone: PEFT files, base config, tokenizer and
processor files, a model card.

`PeftModel.from_pretrained(base, DIR)` loads it; the base weights themselves are not copied. Written
aside and renamed, so that a half-written adapter never carries the final name.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from vise_fast import __version__
from vise_fast.config.schema import Config
from vise_fast.model.load import Policy
from vise_fast.system import files, manifest

TEMPLATE = Path(__file__).parent / "model_card.md"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def export(
    policy: Policy,
    config: Config,
    directory: Path,
    figures: Mapping[str, tuple[str, str]] | None = None,
) -> Path:
    """Write the adapter to `directory`, replacing an older one; its files are hashed. `figures`:
    title -> (base, adapter), for the model card.

    Raises EnvironmentFault where the disk refuses; the older one then stays.
    """
    with files.folder(directory) as aside:
        _save_weights(policy, aside)
        for path in side_files(policy.source):
            shutil.copyfile(path, aside / path.name)
        (aside / "README.md").write_text(model_card(config, figures or {}), encoding="utf-8")
        manifest.write(aside)
    return directory


def _save_weights(policy: Policy, directory: Path) -> None:
    """PEFT's files. Raises OSError."""
    try:
        policy.model.save_pretrained(str(directory), safe_serialization=True)
    except SafetensorError as fault:  # how safetensors says that the disk is full
        raise OSError(str(fault)) from fault


def side_files(source: str) -> list[Path]:
    """The base model's small files, from its directory or from the local hub cache."""
    home = Path(source)
    if not home.is_dir():
        names = list(SIDE_FILES)
        home = Path(snapshot_download(source, allow_patterns=names, local_files_only=True))
    return [home / name for name in SIDE_FILES if (home / name).is_file()]


def model_card(config: Config, figures: Mapping[str, tuple[str, str]]) -> str:
    """What this is, how it was made, measured figures, and a snippet for transformers 5."""
    nano = config.model.path == "nano"
    return TEMPLATE.read_text(encoding="utf-8").format(
        base="vise_fast's embedded nano model" if nano else config.model.path,
        load="BASE_DIRECTORY" if nano else config.model.path,
        version=__version__,
        steps=config.train.steps,
        batch=config.train.batch,
        samples=config.rollout.samples,
        preset=config.reward.preset,
        lr=config.train.lr,
        seed=config.train.seed,
        r=config.lora.r,
        table=_table(figures),
    )


def _table(figures: Mapping[str, tuple[str, str]]) -> str:
    """Title -> (base, adapter) as Markdown; nothing where nothing was measured."""
    if not figures:
        return ""
    lines = ["", "## Measured by the run itself, before and after", ""]
    lines += ["| | base | adapter |", "|---|---|---|"]
    lines += [f"| {title} | {before} | {after} |" for title, (before, after) in figures.items()]
    return "\n".join([*lines, ""])
