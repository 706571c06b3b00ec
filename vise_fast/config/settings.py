"""Settings of a two-level pydantic schema from YAML files and command-line words, and how to talk
about them.

A schema is a model whose fields are models ("sections"); a setting is named `section.key`. Every
fault is a ConfigError of one line. Left out: what the settings are (schema.py), what else a command
takes (command_line.py). Nothing is read from the environment.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vise_fast.config import places
from vise_fast.config.command_line import nearest, split
from vise_fast.system.errors import ConfigError

LARGEST_FILE = 2**20
"""Bytes of a configuration; every setting with its value takes 4,000."""
DEEPEST = 10
"""Brackets and indentations inside each other; a setting takes three."""
Schema = type[BaseModel]
KINDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
UNUSABLE = "unusable"
"""The type of a pydantic fault whose own words say what is expected."""
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def help_text(
    schema: Schema, width: int = 100, values: BaseModel | None = None, topics: Sequence[str] = ()
) -> str:
    """Every setting by section: key, its value (in `values`, else the default), what it is and
    accepts; wrapped to `width` columns.

    topics: only the sections of these names, else only what speaks of every one of these words;
    "all" is everything; "" where nothing does.
    """
    words = [] if list(topics) == ["all"] else [word.lower().lstrip("-") for word in topics]
    lines = []
    for section, about, inside in sections(schema):
        told = []
        for name, field in inside.model_fields.items():
            key = f"{section}.{name}"
            if words == [section] or _speaks_of(words, schema, key, field):
                value = field.default if values is None else get(values, key)
                told += _help_lines(key, field, value, width)
        if told:
            lines += ["", f"{section}: {about}", *told]
    return "\n".join(lines[1:])


def _speaks_of(words: Sequence[str], schema: Schema, key: str, field: FieldInfo) -> bool:
    """Whether every word is in a setting's key or text; a section's name means that section."""
    if len(words) == 1 and words[0] in schema.model_fields:
        return False
    text = f"{key} {field.description} {expected(field)}".lower()
    return all(word in text for word in words)


def _help_lines(key: str, field: FieldInfo, value: Any, width: int) -> list[str]:
    accepts = expected(field)
    described = field.description and field.description != accepts
    about = (f"{field.description}. " if described else "") + f"[{accepts}]"
    indent = " " * 6
    return [
        f"  --{key} {bare(value)}",
        *textwrap.wrap(about, width, initial_indent=indent, subsequent_indent=indent),
    ]


def bare(value: Any) -> str:
    """A value as it is typed on a command line."""
    return show(value).strip("'")


def sections(schema: Schema) -> Iterator[tuple[str, str, Schema]]:
    """(name, its line of help, its model) of every section, in the order of the file."""
    for name, inside in _sections(schema):
        yield name, (inside.__doc__ or "").splitlines()[0], inside


def _sections(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, outer in schema.model_fields.items():
        yield name, cast(Schema, outer.annotation)


def fields(schema: Schema) -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of everything that can be set, in the order of the file."""
    for section, inside in _sections(schema):
        for name, field in inside.model_fields.items():
            yield f"{section}.{name}", field


def changed(values: BaseModel) -> dict[str, Any]:
    """{dotted key: value} of everything that is not at its default."""
    found = {}
    for key, field in fields(type(values)):
        section, name = key.split(".")
        value = getattr(getattr(values, section), name)
        if value != field.default:
            found[key] = value
    return found


def get(values: BaseModel, key: str) -> Any:
    """The value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(values, section), name)


def expected(field: FieldInfo) -> str:
    """What a field accepts, in words: 'an integer >= 1', 'one of none, int8, nf4'."""
    bounds = []
    patterns = []
    for rule in field.metadata:
        bounds += [f"{SIGNS[s]} {_short(getattr(rule, s))}" for s in SIGNS if hasattr(rule, s)]
        patterns += [field.description or ""] if getattr(rule, "pattern", None) else []
    return " ".join([*(patterns or [_kind(field.annotation)]), " and ".join(bounds)]).strip()


def _short(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def read(path: str | Path, schema: Schema) -> dict[str, Any]:
    """The statements of a YAML file as {dotted key: value}; unknown and repeated keys raise
    ConfigError.
    """
    text = _text(path)
    _refuse_glued(text, path, schema)
    try:
        content = _loaded(text)
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(fault, "problem", None) or " ".join(str(fault).split())
        raise ConfigError(f"{path}{line} is not valid YAML: {reason}; correct the file") from None
    return _flatten(content, str(path), schema)


def _text(path: str | Path) -> str:
    """A file, or what a pipe has to say. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
        text = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(
            f"cannot read the configuration {path}: not UTF-8 text; give --config a YAML file"
        ) from None
    except (OSError, ValueError) as fault:  # ValueError: a name with a null character
        reason = getattr(fault, "strerror", None) or fault
        raise ConfigError(
            f"cannot read the configuration {show(path)}: {reason}; {places.advice(path)}"
        ) from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(
            f"the configuration {path} is larger than {LARGEST_FILE // 2**20} MiB; settings take a "
            "few lines; give --config a YAML file of settings"
        )
    return text


def _refuse_glued(text: str, path: str | Path, schema: Schema) -> None:
    """YAML takes `steps:5` for a text of its own, and says something else of it."""
    names = {*schema.model_fields, *(key.rpartition(".")[2] for key, _ in fields(schema))}
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r"\s*(\w+):(\S.*)", line)
        if found is not None and found[1] in names:
            raise ConfigError(
                f"{path} line {number} has no space after the colon of '{line.strip()[:60]}', so "
                f"it states nothing; write '{found[1]}: {found[2][:60]}'"
            )


def _loaded(text: str) -> Any:
    """What a YAML text says. Aliases are refused, since a few lines of them say more than memory
    holds, and so are texts deeper than DEEPEST. Raises yaml.YAMLError.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"the alias *{event.anchor}; write out what it stands for", event)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _refused(f"more than {DEEPEST} levels", event)
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A number or a date that Python does not take stays text; the type check names it."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:
            return node.value


def _refused(problem: str, event: yaml.Event) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def parse(words: Sequence[str], schema: Schema) -> dict[str, Any]:
    """Command-line overrides as {dotted key: value}; a flag of a yes/no field may stand alone.

    Raises ConfigError.
    """
    known = dict(fields(schema))
    values = {}
    for name, text in split(words):
        if name is None:
            raise ConfigError(f"unexpected word '{text}'; settings are written --section.key value")
        _check_key(name, "the command line", schema)
        annotation = known[name].annotation
        if text is None and bool not in (annotation, *get_args(annotation)):
            raise ConfigError(f"--{name} has no value; expected {expected(known[name])}")
        values[name] = _scalar("true" if text is None else text, known[name])
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
        return _loaded(text)
    except yaml.YAMLError:
        return text  # the type check names key and value


def _refuse_repeated(node: yaml.Node | None, path: str | Path) -> None:
    """YAML itself lets the last of two equal keys win silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{path} line {key.start_mark.line + 1} states {show(key.value)} twice; keep one "
                "of them"
            )
        seen.add(key.value)
        _refuse_repeated(value, path)


def _flatten(content: Any, where: str, schema: Schema) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where} holds no settings but {show(content)}; write 'section:' with indented 'key: "
            "value' lines"
        )
    flat: dict[str, Any] = {}
    for section, inside in content.items():
        if isinstance(inside, dict) and section in schema.model_fields:
            flat |= {f"{section}.{_text_of(name)}": value for name, value in inside.items()}
        elif inside is not None or section not in schema.model_fields:
            flat[_text_of(section)] = inside
    for key in flat:
        _check_key(key, where, schema)
    return flat


def nest(flat: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{dotted key: value} -> {section: {key: value}}, as the schema validates it."""
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
    close = nearest(key, keys)
    hint = f"did you mean {' or '.join(close)}?" if close else "--help lists every key"
    raise ConfigError(f"unknown key {show(key)} in {where}; {hint}")


def complaint(fault: ValidationError, schema: Schema) -> str:
    """pydantic's findings as one line: the first of them, and how many more there are."""
    errors = fault.errors()
    first = errors[0]
    known = dict(fields(schema))
    key = ".".join(str(part) for part in first["loc"][:2])
    if key not in known:
        return first["msg"].removeprefix("Value error, ")
    more = len({error["loc"][:2] for error in errors}) - 1
    wanted = f"expected {expected(known[key])}"
    if first["type"] == UNUSABLE:
        wanted = first["msg"]
    return f"{key} cannot be {show(first['input'])}; {wanted}" + (
        f" ({more} more like this)" if more else ""
    )


def show(value: Any) -> str:
    """A value in a message: on one line, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    parts = value if isinstance(value, tuple | list) else (value,)
    text = "\\n".join(f"'{','.join(map(_text_of, parts))}'".splitlines())
    return text if len(text) <= 60 else text[:56] + "...'"


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes out no number of more than 4300 digits
        return "a number of thousands of digits"


def _kind(annotation: Any) -> str:
    """A type in words."""
    if annotation in KINDS:
        return KINDS[annotation]
    parts = get_args(annotation)
    text = str(annotation)
    if "tuple" in text and parts[-1] is Ellipsis:
        return f"a list of {', '.join(str(choice) for choice in get_args(parts[0]))}"
    if "tuple" in text.split("[")[0]:
        return f"{len(parts)} numbers"
    if all(not isinstance(part, type) and not get_args(part) for part in parts):
        return "one of " + ", ".join(map(str, parts)) if len(parts) > 1 else f"'{parts[0]}'"
    return " or ".join(_kind(part) for part in parts)
