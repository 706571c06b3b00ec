"""The finished adapter as a directory that stands alone: PEFT files, tokenizer and processor files,
the settings it was trained with, a model card.

`PeftModel.from_pretrained(base, DIR)` loads it, and so does
`AutoModelForImageTextToText.from_pretrained(DIR)` where the base it names can be found: that is why
no config.json lies beside it. The base weights are not copied. Written aside and renamed, so that a
half-written adapter never carries the final name.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from vise_fast.config.schema import Config
from vise_fast.model.load import Policy, processor_of
from vise_fast.model.saved import card, side_files
from vise_fast.model.saved.card import Made
from vise_fast.system import files, manifest


def export(policy: Policy, config: Config, directory: Path, made: Made | None = None) -> Path:
    """Write the adapter to `directory`, replacing an older one; its files are hashed. `made`: what
    the card tells beside the configuration.

    Raises EnvironmentFault where the disk refuses; the older one then stays.
    """
    with files.folder(directory) as aside:
        _save_weights(policy, config, aside)
        side_files.copy(policy.source, aside, lambda: processor_of(policy.model))
        (aside / card.SETTINGS).write_text(card.training_settings(config), encoding="utf-8")
        text = card.model_card(config, policy.tokens.style, made or Made())
        (aside / "README.md").write_text(text, encoding="utf-8")
        manifest.write(aside)
    return directory


def _save_weights(policy: Policy, config: Config, directory: Path) -> None:
    """PEFT's files; the base by its name. Raises OSError."""
    settings = policy.model.peft_config["default"]
    settings.base_model_name_or_path = card.base_name(config)
    try:  # to look for changed embeddings PEFT would ask the hub, by the base's name
        policy.model.save_pretrained(
            str(directory), safe_serialization=True, save_embedding_layers=False
        )
    except SafetensorError as fault:  # how safetensors says that the disk is full
        raise OSError(str(fault)) from fault
