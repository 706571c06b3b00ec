"""Which configuration a command works with: that of a file, or of the run that an adapter lies in.

With `--adapter RUN/adapter` the run's config.yaml is the configuration, so that a trained adapter
finds its base and its data unasked. An adapter that lies elsewhere brings the base it names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vise_fast.config import schema, settings
from vise_fast.config.command_line import CommandLine
from vise_fast.config.schema import Config, load
from vise_fast.system.errors import ConfigError, EnvironmentFault
from vise_fast.system.files import LARGEST_JSON

OPTIONS = {"config": "FILE.yaml", "adapter": "RUN/adapter", "model": "PATH"}
"""The options that `configuration` reads, each with what its value looks like; and `resume`."""
PROJECTOR = ("merger", "linear_fc", "all-linear", "projector", "connector")
"""What PEFT's `target_modules` holds where LoRA lies on the projectors."""
SETTINGS = tuple(key for key, _ in settings.fields(Config))
"""The dotted keys of everything that can be set."""


def configuration(given: CommandLine, extra: Sequence[str] = ()) -> Config:
    """The configuration of --config, else of the run that --adapter lies in; over it `extra`
    (settings as words), --model, --resume (short for --train.resume) and the settings that were
    typed.

    Raises ConfigError.
    """
    adapter = given.values.get("adapter")
    file = given.values.get("config") or _run_file(adapter)
    model = given.values.get("model") or (_base_of(adapter) if file is None else None)
    resume = given.values.get("resume")
    overrides = list(extra)
    if model:
        overrides.append(f"--model.path={model}")
    if resume is not None:
        overrides.append(f"--train.resume={resume}")
    return load(file, [*overrides, *given.settings])


def stated(given: CommandLine) -> dict[str, Any]:
    """{dotted key: value as written} of everything that the words, and the file they name, say."""
    found = schema.stated(given.values.get("config"), given.settings)
    if given.values.get("resume") is not None:
        found["train.resume"] = given.values["resume"]
    return found


def preset_notes(given: CommandLine) -> Iterator[str]:
    """What a person should know who typed a preset over a file. Raises ConfigError."""
    file = given.values.get("config")
    kept = schema.kept_from_preset(file, given.settings)
    if kept:
        listed = ", ".join(
            f"{key} {settings.bare(own)} ({settings.bare(preset)})"
            for key, (own, preset) in kept.items()
        )
        yield (
            f"--reward.preset fills what {file} leaves open; the file still decides {listed}; in "
            "brackets what the preset says; type those you want from it"
        )


def from_adapter(config: Config, stated: Mapping[str, Any]) -> Config:
    """Where training starts from an adapter, its rank, alpha and targets are the run's.

    Raises ConfigError where others were stated, or where the adapter cannot be read.
    """
    if config.lora.init_from is None:
        return config
    written = _adapter_config(Path(config.lora.init_from))
    changes = {}
    for key, value in _adapter_settings(written).items():
        if key in stated and settings.get(config, key) != value:
            raise ConfigError(
                f"{key} {settings.show(settings.get(config, key))} is not that of the adapter "
                f"{config.lora.init_from}, {settings.show(value)}; training goes on with the "
                "adapter's; leave it out"
            )
        changes[key] = value
    return schema.with_changes(config, changes)


def _adapter_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of what an adapter's own file says about a run's settings."""
    found: dict[str, Any] = {}
    for key, name in (("lora.r", "r"), ("lora.alpha", "lora_alpha")):
        value = written.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = value
    targets = written.get("target_modules")
    if isinstance(targets, str | list):  # one pattern, or names
        both = f"{targets} {written.get('target_parameters') or ''}"
        found["lora.projector"] = any(name in both for name in PROJECTOR)
    return found


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json. Raises ConfigError where there is none, EnvironmentFault where
    it is damaged.
    """
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(
            f"adapter {adapter} has no adapter_config.json; it is not an adapter directory; point "
            "at RUN/adapter"
        )
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError("larger than any that PEFT writes")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as fault:
        raise EnvironmentFault(
            f"adapter {adapter} has an adapter_config.json that is no JSON ({fault}); it is "
            "damaged; copy it again, or point at RUN/adapter"
        ) from None
    return content


def _run_file(adapter: str | None) -> str | None:
    """config.yaml of the run that an adapter directory belongs to."""
    found = Path(adapter).resolve().parent / "config.yaml" if adapter else None
    return str(found) if found is not None and found.is_file() else None


def _base_of(adapter: str | None) -> str | None:
    """The base that PEFT wrote down; 'nano' for the embedded one, wherever it was installed. None
    without an adapter or its file (loading says what is wrong with a directory).

    Raises ConfigError for a local base's bare name, which does not say where it lies.
    """
    if adapter is None or not (Path(adapter) / "adapter_config.json").is_file():
        return None
    base = _adapter_config(Path(adapter)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return None
    if base == "nano" or Path(base).parts[-2:] == ("vise_fast", "nano"):
        return "nano"
    if "/" not in base and not Path(base).is_dir():
        raise ConfigError(
            f"adapter {adapter} was trained on a local model called {base[:80]}; it does not say "
            "where that lies; give its directory as --model DIRECTORY"
        )
    return base
