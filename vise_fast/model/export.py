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
    policy: Policy, config: Config, directory: Path, figures: Mapping[str, tuple] | None = None
) -> Path:
    """Write the adapter to `directory`, replacing an older one; its files are hashed.

    Raises EnvironmentFault where the disk refuses; the older one then stays.
    """
    with files.folder(directory) as aside:
        _save_weights(policy, aside)
        for path in side_files(policy.source):
            shutil.copyfile(path, aside / path.name)
        (aside / "README.md").write_text(card(config, figures or {}), encoding="utf-8")
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
    home = (
        Path(source)
        if Path(source).is_dir()
        else Path(snapshot_download(source, allow_patterns=list(SIDE_FILES), local_files_only=True))
    )
    return [home / name for name in SIDE_FILES if (home / name).is_file()]


def card(config: Config, figures: Mapping[str, tuple]) -> str:
    """The model card: what this is, how it was made, measured figures, and a snippet for
    transformers 5.
    """
    rows = "".join(
        f"| {name} | {before} | {after} |\n" for name, (before, after) in figures.items()
    )
    table = (
        (
            "\n## Measured by the run itself, before and after\n\n| | base | adapter "
            f"|\n|---|---|---|\n{rows}"
        )
        if rows
        else ""
    )
    base = "vise_fast's embedded nano model" if config.model.path == "nano" else config.model.path
    return CARD.format(
        base=base,
        load=config.model.path if config.model.path != "nano" else "BASE_DIRECTORY",
        version=__version__,
        steps=config.train.steps,
        batch=config.train.batch,
        samples=config.rollout.samples,
        preset=config.reward.preset,
        lr=config.train.lr,
        seed=config.train.seed,
        r=config.lora.r,
        table=table,
    )


CARD = """---
library_name: peft
base_model: {load}
tags: [vise, self-evolution, visual-grounding, lora]
---
# LoRA adapter for {base}, trained without labels by VISE

VISE (Visual Invariance Self-Evolution, arXiv 2606.27373) lets a vision-language model reward itself for boxes that agree across
transformed views and that hide their object when blurred. Trained with vise_fast {version}: preset `{preset}`, {steps} updates of
{batch} images with {samples} boxes each, learning rate {lr:g}, LoRA rank {r}, seed {seed}.
{table}
## Use (transformers 5, peft)

```python
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer

base = AutoModelForImageTextToText.from_pretrained("{load}", dtype="auto")
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_DIRECTORY").eval()
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_DIRECTORY")
```

`AutoProcessor.from_pretrained` on this directory builds the image processor where torchvision is installed. The adapter is stored in
fp32: at small learning rates a bf16 merge would round much of the update away (`python -m vise_fast.merge` says how much).
"""
