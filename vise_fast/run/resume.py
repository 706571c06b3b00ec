"""What a resumed run is: the same run. Its own config.yaml is the base; what may change is a short
list, the rest is refused.

`resolve` looks at what was typed and says where the run goes on (`Start`): from which checkpoint,
written where, with which configuration. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from vise_fast.config import schema, settings
from vise_fast.config.schema import Config
from vise_fast.run import identity
from vise_fast.system import checkpoint
from vise_fast.system.errors import ConfigError

MAY_CHANGE = frozenset(
    {
        "train.steps",
        "train.micro_batch",
        "train.checkpointing",
        "train.share_forward",
        "data.workers",
        "data.dir",
        "data.mix",
        "data.column",
        "data.queries",
        "model.device",
        "memory.budget_gb",
        "run.checkpoint_every",
        "run.keep",
        "run.samples_every",
        "run.report",
        "run.loggers",
        "run.dir",
    }
    | {key for key, _ in settings.fields(Config) if key.startswith("eval.")}
)
"""What may differ from the run's own configuration: none of it changes what the run computes,
beside how long, how cut, and how figures are taken.
"""
NOT_ITS_OWN = "train.resume"


@dataclass
class Start:
    """Where a run begins or goes on. `checkpoint` None: from the first step.

    notes: what a person should know (checkpoints passed over, where a copy goes on); older: what
    the run falls back to where the model does not take `checkpoint`.
    """

    config: Config
    directory: Path
    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)
    older: Sequence[Path] = ()


def resolve(config: Config, stated: Mapping[str, Any]) -> Start:
    """What `config` (as typed, resolved) and the keys that were `stated` in it mean.

    Raises ConfigError for a change that is not allowed, for nothing to go on from, and for a place
    that belongs to another run; checkpoint.Corrupt where no checkpoint is whole.
    """
    wanted = config.train.resume
    place = Path(config.run.dir)
    if wanted is None:
        free = identity.fresh(place)
        taken = f"{place} is taken, so this run goes into {free}"
        return Start(config, free, notes=[taken] if free != place else [])
    if wanted == "auto":
        return _auto(config, stated, place)
    return _from(config, stated, Path(wanted))


def _auto(config: Config, stated: Mapping[str, Any], place: Path) -> Start:
    """The newest whole checkpoint of the run at `place`; a new run in an empty or new folder."""
    if identity.is_free(place):
        return Start(config, place, notes=[f"no run at {place} yet: starting one"])
    if not identity.is_run(place):
        raise ConfigError(
            f"{place} is neither a run nor empty; nothing can go on there; give --run.dir the "
            "run's folder, or a new one"
        )
    choice = checkpoint.choose("auto", place, _judge)
    if choice.path is None:
        return _anew(config, stated, place)
    own = _own_config(choice.path, place)
    return _going_on(config, stated, own, choice, place)


def _judge(path: Path) -> None:
    """Raises checkpoint.Corrupt where a checkpoint's own configuration cannot be read."""
    if (path / checkpoint.CONFIG).is_file():
        try:
            schema.load(path / checkpoint.CONFIG)
        except ConfigError as fault:
            raise checkpoint.Corrupt(f"the checkpoint {path} cannot be used: {fault}") from None


def _anew(config: Config, stated: Mapping[str, Any], place: Path) -> Start:
    """A run that ended before its first checkpoint begins again where it was, with its own settings
    and those that are stated now.
    """
    if (place / "adapter").exists():
        raise ConfigError(
            f"the run {place} has no checkpoint to go on from, but an adapter, which would be "
            "overwritten; start anew with another --run.dir, or delete the folder"
        )
    merged = config.model_copy(deep=True)
    own = place / "config.yaml"
    if own.is_file():
        changes = _changes(config, stated, schema.load(own))
        merged = schema.with_changes(
            schema.load(own), {key: new for key, (_, new) in changes.items()}
        )
    merged.train.resume = config.train.resume
    merged.run.dir = str(place)
    note = f"the run {place} ended before its first checkpoint: it begins again"
    return Start(merged, place, notes=[note])


def _from(config: Config, stated: Mapping[str, Any], wanted: Path) -> Start:
    """From a run's folder, or from one checkpoint of a run or a copy of one."""
    choice = checkpoint.choose(str(wanted), wanted, _judge)
    if choice.path is None:
        raise ConfigError(f"{wanted} holds no checkpoint; give --resume one of RUN/checkpoints")
    home = identity.run_of(choice.path)
    own = _own_config(choice.path, home)
    if "run.dir" in stated:
        place = Path(config.run.dir)
    elif home is not None:
        place = home
    else:
        raise ConfigError(
            f"{wanted} lies in no run; it is not clear where to write; say --run.dir with a new "
            "folder"
        )
    if home is None or place.resolve() != home.resolve():
        _refuse_occupied(place, wanted)
        choice.notes.append(f"{place} goes on from {choice.path}, which stays as it is")
    return _going_on(config, stated, own, choice, place)


def _refuse_occupied(place: Path, wanted: Path) -> None:
    if not identity.is_free(place):
        raise ConfigError(
            f"run.dir {place} is not empty and not the run that {wanted} belongs to; it would be "
            "overwritten; give --run.dir a new folder"
        )


def _own_config(path: Path, home: Path | None) -> Config:
    """The configuration that a checkpoint was made with: its own copy, else the run's. What may
    change is what the run was last started with, which a checkpoint may not know yet.
    """
    copy = path / checkpoint.CONFIG
    if copy.is_file():
        own = schema.load(copy)
        later = None if home is None else identity.last_config(home)
        return own if later is None else _changed_since(own, schema.load(later))
    if home is not None and (home / "config.yaml").is_file():
        return schema.load(home / "config.yaml")
    raise ConfigError(
        f"the checkpoint {path} does not say what it was trained with (it was made by version 0.1 "
        "and lies in no run); put it back into RUN/checkpoints"
    )


def _changed_since(own: Config, later: Config) -> Config:
    """A configuration with those of a later one's values that may change."""
    keys = MAY_CHANGE - ({"train.steps"} if own.train.schedule == "cosine" else set())
    values = {key: settings.get(later, key) for key in sorted(keys)}
    return schema.with_changes(
        own, {key: value for key, value in values.items() if settings.get(own, key) != value}
    )


def _going_on(
    config: Config,
    stated: Mapping[str, Any],
    own: Config,
    choice: checkpoint.Choice,
    place: Path,
) -> Start:
    """From the checkpoint that was chosen, with its own configuration and the changes that are
    allowed.
    """
    path = choice.path
    assert path is not None
    changes = _changes(config, stated, own)
    home = identity.run_of(path) or path
    for key, (old, new) in changes.items():
        _refuse(key, old, new, own, home)
    merged = schema.with_changes(own, {key: new for key, (_, new) in changes.items()})
    merged.train.resume = config.train.resume
    merged.run.dir = str(place)
    return Start(merged, place, path, list(choice.notes), choice.older)


def _changes(config: Config, stated: Mapping[str, Any], own: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (the run's value, the stated one)} of what was stated and differs."""
    found = {}
    for key in stated:
        if key == NOT_ITS_OWN:
            continue
        old = settings.get(own, key)
        new = settings.get(config, key)
        if old != new:
            found[key] = (old, new)
    return found


def _refuse(key: str, old: Any, new: Any, own: Config, home: Path) -> None:
    """Raises ConfigError for a change that would make it another run."""
    shape = key == "train.steps" and own.train.schedule == "cosine"
    if key in MAY_CHANGE and not shape:
        return
    why = " (train.steps is the shape of its cosine schedule)" if shape else ""
    raise ConfigError(
        f"{key} is {settings.show(old)} in the run {home}, not {settings.show(new)}{why}; a "
        "resumed run keeps its settings; leave it out, or start a new run from that adapter: "
        f"--lora.init_from {quote(str(home / 'adapter'))} --run.dir NEW"
    )


def refuse_changes(changes: Mapping[str, Any], place: Path) -> None:
    """Raises ConfigError where what was chosen to fit memory would make it another run."""
    for key, value in changes.items():
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"memory.budget_gb asks for {key} {settings.show(value)}, which the run {place} "
                "does not have; a resumed run keeps its settings; raise --memory.budget_gb, or "
                f"start a new run: --lora.init_from {quote(str(place / 'adapter'))} --run.dir NEW"
            )
