"""The words after a command: its own `--name value` options and bare `--flags`, words without a
name (a directory), and settings of the configuration as `--section.key value`.

    given = Syntax(options={"out": "DIR"}, positional=1).parse(words)
    given["out"], given.positional

Every command knows `--help` (`-h`) and `--debug` (system/console.py reads it). `--name=value` is
the same as `--name value`. An unknown word is refused, with the word it was probably meant to be.
Needs no installed package: the doctor reads its words where they are broken. Left out: what a
setting may be (settings.py), which configuration a command works with (origin.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from os.path import isdir
from typing import NamedTuple

from vise_fast.system.errors import ConfigError

EVERYWHERE = ("help", "debug")


class Word(NamedTuple):
    """One word of a command line: `--name value`, `--name` (value None) or a word without a name
    (name None).
    """

    name: str | None
    value: str | None

    def __str__(self) -> str:
        if self.name is None:
            return self.value or ""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"


def split(words: Sequence[str], flags: Sequence[str] = ()) -> Iterator[Word]:
    """The words of a command line by name and value, in their order. A name among `flags` takes no
    word that follows it.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            yield Word(None, word)
            continue
        name, equals, value = word[2:].partition("=")
        if equals:
            yield Word(name, value)
        elif name not in flags and rest and not rest[0].startswith("--"):
            yield Word(name, rest.pop(0))
        else:
            yield Word(name, None)


def nearest(key: str, keys: Sequence[str]) -> list[str]:
    """The known dotted keys that a wrong one may stand for, at most three; [] where none is like
    it.
    """
    return (
        get_close_matches(key, keys, n=1, cutoff=0.75)
        or same_leaf(key, keys)
        or get_close_matches(key, keys, n=1, cutoff=0.5)
    )


def same_leaf(key: str, keys: Sequence[str]) -> list[str]:
    """The first three keys that end as this one does: train.steps for `steps` and `run.steps`."""
    leaf = key.rpartition(".")[2]
    return [known for known in keys if known.rpartition(".")[2] == leaf][:3]


@dataclass
class CommandLine:
    """Parsed words: `values` of the command's options (None: not given), `flags` that were given,
    `positional` words without a name, `settings` as `--section.key=value` words.

    help: nothing is wanted but the command's help; then all else is empty.
    """

    values: dict[str, str | None]
    flags: set[str] = field(default_factory=set)
    positional: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    help: bool = False

    def __getitem__(self, option: str) -> str | None:
        return self.values[option]

    def count(self, option: str) -> int | None:
        """An option as a number of things. Raises ConfigError."""
        text = self.values[option]
        if text is not None and not text.isdecimal():
            raise ConfigError(
                f"--{option} {text} is no whole number; it counts things; write --{option} 64"
            )
        return None if text is None else int(text)


@dataclass(frozen=True)
class Syntax:
    """What may follow a command.

    options: {name: what its value looks like}; flags: names without a value; positional: how many
    words without a name are welcome; settings: the dotted keys of the configuration where
    `--section.key value` is (whether there is such a key is checked when it is loaded).
    """

    options: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    positional: int = 0
    settings: tuple[str, ...] = ()

    def parse(self, words: Sequence[str]) -> CommandLine:
        """Sorts the words of a command line. Raises ConfigError for a word that has no place here,
        an option without its value and a flag with one.
        """
        given = CommandLine(dict.fromkeys(self.options))
        given.help = bool({"-h", "--help"} & set(words))
        if not given.help:
            for word in split(words, (*self.flags, *EVERYWHERE)):
                self._take(word, given)
        return given

    def _take(self, word: Word, given: CommandLine) -> None:
        if word.name is None:
            if len(given.positional) == self.positional:
                raise ConfigError(f"unexpected word '{word.value}'; {self._advice(word)}")
            given.positional.append(word.value or "")
        elif word.name in self.options:
            if word.value is None:
                raise ConfigError(f"{word} has no value; write {word} {self.options[word.name]}")
            given.values[word.name] = word.value
        elif word.name in (*self.flags, *EVERYWHERE):
            if word.value is not None:
                raise ConfigError(f"{word} has a value; write --{word.name} alone")
            given.flags.add(word.name)
        elif self.settings and "." in word.name:
            given.settings.append(str(word))
        else:
            raise ConfigError(f"unknown option --{word.name}; {self._advice(word)}")

    def _advice(self, word: Word) -> str:
        """What was probably meant by an unknown word, else what there is."""
        known = (*self.options, *self.flags, *EVERYWHERE)
        if word.name is None and "data.dir" in self.settings and isdir(word.value or ""):
            return f"a folder of pictures is named as --data.dir {shlex.quote(word.value or '')}"
        meant = self._meant(word, known)
        if meant:
            return f"did you mean {' or '.join(f'--{name}' for name in meant)}?"
        settings = ", and settings as --section.key value" if self.settings else ""
        return f"known: {', '.join(f'--{name}' for name in known)}{settings}"

    def _meant(self, word: Word, known: Sequence[str]) -> list[str]:
        typed = word.name or (word.value or "").lstrip("-")
        keys = self.settings if word.name is not None or "." in typed else ()
        own = get_close_matches(typed, known, n=1)
        return same_leaf(typed, keys) or own or nearest(typed, keys)
