"""The words after a small command (evaluate, infer, merge, report): its own `--name value` options,
then settings as for training.

With `--adapter RUN/adapter` the run's config.yaml is the configuration, so that a trained adapter
finds its base and its data unasked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config
from vise_fast.system.errors import ConfigError


@dataclass(frozen=True)
class Words:
    """Parsed words: `values` of the command's own options (None: not given), `places` without a
    name, `settings` for the configuration.
    """

    values: Mapping[str, str | None]
    places: list[str]
    settings: list[str]
    help: bool = False

    def __getitem__(self, name: str) -> str | None:
        return self.values[name]

    def whole(self, name: str) -> int | None:
        """An option as a number of things. Raises ConfigError."""
        text = self.values[name]
        if text is not None and not text.isdecimal():
            raise ConfigError(
                f"--{name} {text} is no whole number; it counts things; write --{name} 64"
            )
        return None if text is None else int(text)

    def configuration(self, extra: Sequence[str] = ()) -> Config:
        """The run's configuration where the adapter lies in a run (or --config names one), then
        settings; --model wins over both.
        """
        adapter = self.values.get("adapter")
        model = self.values.get("model")
        file = self.values.get("config") or _run_file(adapter)
        base = model or (_base_of(adapter) if file is None else None)
        return configuration.load(
            file, [*extra, *([f"--model.path={base}"] if base else []), *self.settings]
        )


def parse(words: Sequence[str], options: Sequence[str], places: int = 0) -> Words:
    """Sorts words; `options` take a value each, `places` is how many bare words are welcome.

    Raises ConfigError.
    """
    values: dict[str, str | None] = dict.fromkeys(options)
    bare = []
    settings = []
    rest = list(words)
    if {"-h", "--help"} & set(rest):
        return Words(values, [], [], help=True)
    while rest:
        word, equals, text = rest.pop(0).partition("=")
        name = word[2:]
        if word == "--debug":
            continue
        if not word.startswith("--"):
            bare.append(word + equals + text)
        elif name in values:
            if not equals and (not rest or rest[0].startswith("--")):
                raise ConfigError(f"{word} has no value; write {word} VALUE")
            values[name] = text if equals else rest.pop(0)
        elif "." in name:
            settings.append(word + equals + text)
            settings += (
                [rest.pop(0)] if not equals and rest and not rest[0].startswith("--") else []
            )
        else:
            near = get_close_matches(name, options, n=1)
            raise ConfigError(
                f"unknown option {word}; "
                f"{f'did you mean --{near[0]}' if near else 'known: ' + ', '.join('--' + o for o in options)}"
            )
    if len(bare) > places:
        raise ConfigError(f"unexpected word '{bare[places]}'; options are written --name value")
    return Words(values, bare, settings)


def _run_file(adapter: str | None) -> str | None:
    """config.yaml of the run that an adapter directory belongs to."""
    found = Path(adapter).resolve().parent / "config.yaml" if adapter else None
    return str(found) if found is not None and found.is_file() else None


def _base_of(adapter: str | None) -> str | None:
    """The base that PEFT wrote down; 'nano' for the embedded one, wherever it was installed. None
    without an adapter or its file (loading says what is wrong with a directory).
    """
    file = Path(adapter) / "adapter_config.json" if adapter else None
    if file is None or not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise ConfigError(
            f"adapter {adapter} has an adapter_config.json that is no JSON; it is damaged; point "
            "at RUN/adapter"
        ) from None
    return "nano" if base and Path(base).parts[-2:] == ("vise_fast", "nano") else base
