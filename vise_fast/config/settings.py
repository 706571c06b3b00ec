"""Settings of a two-level pydantic schema from YAML files and command-line words, and how to talk
about them.

A schema is a model whose fields are models ("sections"); a setting is named `section.key`. Every
fault is a ConfigError of one line. Left out: what the settings are (config.py). Nothing is read
from the environment.
"""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from collections.abc import Iterator, Sequence

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vise_fast.system.errors import ConfigError

Schema = type[BaseModel]


@dataclass(frozen=True)
class Command:
    """The words of a command line, sorted: the file, the overrides for `parse`, and the bare flags
    that were given.
    """

    config: str | None
    overrides: list[str]
    flags: frozenset[str]


def command(words: Sequence[str], flags: Sequence[str] = ("dry-run", "debug", "help")) -> Command:
    """Sorts `--config FILE`, `--resume WHERE` (short for --train.resume), bare `--flags` and
    overrides.
    """
    config = None
    overrides = []
    given = set()
    rest = list(words)
    while rest:
        word, equals, text = rest.pop(0).partition("=")
        if word in ("-h", "--help"):
            given.add("help")
        elif word.startswith("--") and word[2:] in flags:
            given.add(word[2:])
        elif word in ("--config", "--resume"):
            if not equals and (not rest or rest[0].startswith("--")):
                raise ConfigError(
                    f"{word} has no value; write {word} "
                    f"{'FILE.yaml' if word == '--config' else 'auto'}"
                )
            text = text if equals else rest.pop(0)
            config = text if word == "--config" else config
            overrides += [f"--train.resume={text}"] if word == "--resume" else []
        else:
            overrides.append(word + equals + text)
    return Command(config, overrides, frozenset(given))


def help_text(schema: Schema, width: int = 100) -> str:
    """Every setting by section: key, what it accepts, default, description; wrapped to `width`
    columns.
    """
    lines = []
    for section, outer in schema.model_fields.items():
        lines += ["", f"{section}: {outer.annotation.__doc__.splitlines()[0]}"]
        for name, field in outer.annotation.model_fields.items():
            accepts = expected(field)
            default = _show(field.default).strip("'")
            about = (
                f"{field.description}. "
                if field.description and field.description != accepts
                else ""
            )
            lines.append(f"  --{section}.{name} {default}")
            lines += textwrap.wrap(
                about + f"[{accepts}]", width, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines[1:])


def fields(schema: Schema) -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything that can be set, in the order of the file."""
    for section, outer in schema.model_fields.items():
        for name, field in outer.annotation.model_fields.items():
            yield f"{section}.{name}", field


def changed(values: BaseModel) -> dict[str, Any]:
    """{dotted key: value} of everything that is not at its default."""
    stated = (
        (key, field, getattr(getattr(values, key.split(".")[0]), key.split(".")[1]))
        for key, field in fields(type(values))
    )
    return {key: value for key, field, value in stated if value != field.default}


def expected(field: FieldInfo) -> str:
    """What a field accepts, in words: 'an integer >= 1', 'one of none, int8, nf4'."""
    text = _kind(field.annotation)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in signs.items()
        if hasattr(rule, name)
    ]
    patterns = [
        field.description or "" for rule in field.metadata if getattr(rule, "pattern", None)
    ]
    return " ".join([*(patterns or [text]), " and ".join(bounds)]).strip()


def read(path: str | Path, schema: Schema) -> dict[str, Any]:
    """The statements of a YAML file as {dotted key: value}; unknown and repeated keys raise
    ConfigError.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
    except OSError as fault:
        raise ConfigError(
            f"cannot read the configuration {path}: {fault.strerror}; give --config an existing "
            "YAML file"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"cannot read the configuration {path}: not UTF-8 text; give --config a YAML file"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        line = (
            f" line {fault.problem_mark.line + 1}" if getattr(fault, "problem_mark", None) else ""
        )
        raise ConfigError(
            f"{path}{line} is not valid YAML: "
            f"{getattr(fault, 'problem', None) or ' '.join(str(fault).split())}; correct the file"
        ) from None
    return _flatten(content, str(path), schema)


def parse(words: Sequence[str], schema: Schema) -> dict[str, Any]:
    """Command-line overrides as {dotted key: value}; a flag of a yes/no field may stand alone."""
    known = dict(fields(schema))
    values = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected word '{word}'; settings are written --section.key value")
        key, equals, text = word[2:].partition("=")
        _check_key(key, "the command line", schema)
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and known[key].annotation is bool:
            text = "true"
        elif not equals:
            raise ConfigError(f"--{key} has no value; expected {expected(known[key])}")
        values[key] = _scalar(text, known[key])
    return values


def _scalar(text: str, field: FieldInfo) -> Any:
    """One command-line value: YAML, except that a text field takes the word as typed (a folder may
    be called 2024).
    """
    if field.annotation is str or (
        field.annotation == str | None and text.lower() not in ("null", "none", "~", "")
    ):
        return text
    if text.lower() == "none" and type(None) in get_args(field.annotation):
        return None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text  # the type check names key and value


def _refuse_repeated(node: yaml.Node | None, path: str | Path) -> None:
    """YAML itself lets the last of two equal keys win silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{path} line {key.start_mark.line + 1} states '{key.value}' twice; keep one of "
                "them"
            )
        seen.add(key.value)
        _refuse_repeated(value, path)


def _flatten(content: Any, where: str, schema: Schema) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where} holds no settings but {_show(content)}; write 'section:' with indented 'key: "
            "value' lines"
        )
    flat: dict[str, Any] = {}
    for section, inside in content.items():
        if isinstance(inside, dict) and section in schema.model_fields:
            flat |= {f"{section}.{name}": value for name, value in inside.items()}
        elif inside is not None or section not in schema.model_fields:
            flat[str(section)] = inside
    for key in flat:
        _check_key(key, where, schema)
    return flat


def nest(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    return nested


def _check_key(key: str, where: str, schema: Schema) -> None:
    keys = [known for known, _ in fields(schema)]
    if key in keys:
        return
    if key in schema.model_fields:
        raise ConfigError(
            f"'{key}' in {where} is a section; write its settings as {key}.name, for example "
            f"{next(k for k in keys if k.startswith(key + '.'))}"
        )
    same_leaf = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    close = (
        difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
        or same_leaf[:3]
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    )
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every key"
    raise ConfigError(f"unknown key '{key}' in {where}; {hint}")


def complaint(fault: ValidationError, schema: Schema) -> str:
    errors = fault.errors()
    first = errors[0]
    known = dict(fields(schema))
    key = ".".join(str(part) for part in first["loc"][:2])
    if key not in known:
        return first["msg"].removeprefix("Value error, ")
    more = len({error["loc"][:2] for error in errors}) - 1
    return f"{key} cannot be {_show(first['input'])}; expected {expected(known[key])}" + (
        f" ({more} more like this)" if more else ""
    )


def _show(value: Any) -> str:
    value = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else f"'{value}'"
    )
    return text if len(text) <= 60 else text[:56] + "...'"


def _kind(annotation: Any) -> str:
    """A type in words."""
    words = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    if annotation in words:
        return words[annotation]
    parts = get_args(annotation)
    text = str(annotation)
    if "tuple" in text and parts[-1] is Ellipsis:
        return f"a list of {', '.join(str(choice) for choice in get_args(parts[0]))}"
    if "tuple" in text.split("[")[0]:
        return f"{len(parts)} numbers"
    if all(not isinstance(part, type) and not get_args(part) for part in parts):
        return "one of " + ", ".join(map(str, parts)) if len(parts) > 1 else f"'{parts[0]}'"
    return " or ".join(_kind(part) for part in parts)
