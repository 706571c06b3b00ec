"""The commands by name: what may follow each, and its page of help. What `vise-fast NAME` and
`python -m vise_fast.NAME` say before anything heavy is imported.

A command's file calls `begin` before its other imports: `--help` is answered, and words that cannot
be meant are refused, in the time that Python takes to start. Left out: what a command does (its own
file, whose first docstring is the text of its page).
"""

from __future__ import annotations

import ast
import importlib.util
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vise_fast.config.command_line import Syntax
from vise_fast.system.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from vise_fast.config.schema import Config

NEEDED = ("numpy", "rich", "yaml", "pydantic", "torch", "transformers", "peft", "PIL", "jinja2")
"""Packages without which no command but the doctor runs."""
KERNELS = "vise_kernels"
CONFIG = {"config": ("FILE.yaml", "settings in a YAML file, or a shipped preset by its name")}
RESUME = {"resume": ("auto", "go on: auto, a run's folder or a checkpoint")}
ORIGIN = CONFIG | {
    "adapter": ("RUN/adapter", "an adapter; its run's settings come with it"),
    "model": ("PATH", "directory or hub id of the base, short for --model.path"),
}
EVERYWHERE = {
    "debug": "show the traceback of a fault",
    "help": "this page; followed by words: what has to do with them; --help all: every setting",
}
EXIT_CODES = {
    0: "done",
    2: "configuration",
    3: "data",
    4: "environment",
    5: "memory floor",
    6: "numbers not finite",
    7: "an alarm ended it",
    "129/130/143": "stopped by SIGHUP, Ctrl-C or SIGTERM (and saved)",
}
FIRST = (
    "data.dir",
    "model.path",
    "run.dir",
    "train.steps",
    "train.batch",
    "train.lr",
    "reward.preset",
    "memory.budget_gb",
)
"""The settings that most people change."""
OTHERS = (
    "settings of a run may be changed too, as --section.key value: --help WORD searches them, "
    "--help all lists them"
)
NARROWEST = 60
WIDEST = 100
Explained = Mapping[str, tuple[str, str]]
"""{option: (what its value looks like, what it means)}"""


@dataclass(frozen=True)
class Command:
    """One command: `module` holds its `main`, `text` (a file of the package) its docstring.

    about: a line for the list of commands; takes: words without a name, as the usage shows them
    (at most `positional`); settings: whether `--section.key value` is welcome; loads: whether it
    loads the model; alone: it runs where packages are missing; extra: a package that it alone
    needs, and what to do without.
    """

    name: str
    about: str
    module: str
    options: Explained = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    takes: str = ""
    positional: int = 0
    settings: bool = False
    loads: bool = False
    alone: bool = False
    extra: tuple[str, str] | None = None
    text: str = ""

    @property
    def syntax(self) -> Syntax:
        """What may follow it."""
        keys: tuple[str, ...] = ()
        if self.settings:
            from vise_fast.config import origin

            keys = origin.SETTINGS
        looks = {name: shape for name, (shape, _) in self.options.items()}
        return Syntax(looks, tuple(self.flags), self.positional, keys)

    @property
    def docstring(self) -> str:
        """The first words of its file, which is not imported for them."""
        path = self.text or self.module.replace(".", "/") + ".py"
        source = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
        return ast.get_docstring(ast.parse(source)) or ""


ALL = (
    Command(
        "train",
        "train an adapter on images without labels",
        "train",
        CONFIG | RESUME,
        {
            "dry-run": "say what would run, what fits and what is missing; one real step",
            "verbose": "say which kernels and which attention run",
        },
        settings=True,
        loads=True,
    ),
    Command(
        "evaluate",
        "held-out figures with intervals, base and adapter side by side",
        "evaluate.__main__",
        ORIGIN
        | {
            "scenes": ("64", "held-out images, short for --eval.scenes"),
            "json": ("FILE", "write every figure there"),
            "alphas": ("0,0.5,1", "figures at these shares of the adapter's update"),
        },
        settings=True,
        loads=True,
    ),
    Command(
        "probe",
        "what the base answers on your pictures, in which prompt style, before training",
        "probe.__main__",
        ORIGIN
        | {
            "pictures": ("32", "how many pictures are asked about"),
            "styles": ("natural,json", "the prompt styles to try; else its own and the usual ones"),
            "html": ("probe.html", "the page of sample cards"),
        },
        settings=True,
        loads=True,
    ),
    Command(
        "data",
        "what is in a folder, an archive or a table of pictures, before training",
        "data.__main__",
        CONFIG
        | {
            "html": ("data.html", "the page with all of it"),
            "png": ("data.png", "the contact sheet"),
        },
        takes="PLACE",
        positional=1,
        settings=True,
    ),
    Command(
        "infer",
        "ask a model about one picture",
        "infer",
        ORIGIN
        | {
            "image": ("photo.jpg", "the picture"),
            "query": ("TEXT", "what to look for; without it the model names something"),
            "draw": ("FILE.png", "the picture with the box on it"),
        },
        settings=True,
        loads=True,
    ),
    Command(
        "demo",
        "try base and adapter on your own picture, in a browser on this machine",
        "demo.__main__",
        ORIGIN | {"port": ("7860", "where the page is on this machine; else the first free one")},
        settings=True,
        loads=True,
        extra=("gradio>=5", "use vise-fast infer"),
    ),
    Command(
        "report",
        "one page that shows a run",
        "report.__main__",
        {"port": ("8000", "--live: where the page is on this machine; else any free one")},
        {"live": "follow a run that is still going on, in a browser on this machine"},
        takes="RUN",
        positional=1,
    ),
    Command(
        "compare",
        "runs beside each other: figures, settings, curves",
        "compare",
        {"out": ("compare.html", "the page; compare.html where nothing is said")},
        takes="RUN RUN…",
        positional=100,
    ),
    Command(
        "sweep",
        "several runs over a grid or a list of settings, and their table",
        "sweep",
        flags={"dry-run": "say the runs, and which of them are finished"},
        takes="FILE.yaml",
        positional=1,
    ),
    Command(
        "merge",
        "fold an adapter into its base",
        "merge",
        ORIGIN
        | {
            "out": ("DIR", "a new directory for the model"),
            "dtype": ("float32", "of the weights written; else the base's own"),
        },
        {"lossy": "write even where rounding takes more than half of the update"},
        settings=True,
        loads=True,
    ),
    Command(
        "export",
        "an adapter in the form that its next reader takes",
        "export.__main__",
        ORIGIN
        | {
            "form": ("portable|linked|merged|language-only", "what is made; portable by itself"),
            "out": ("DIR", "a new directory for it"),
            "alpha": ("0.5", "how far from the base (0) to the adapter (1)"),
            "average": ("A B", "the mean of several adapters"),
            "dtype": ("float32", "merged: of the weights written"),
            "push": ("OWNER/NAME", "say what would be sent to the hub"),
        },
        {
            "copy": "linked: copy the base's weights",
            "lossy": "merged: accept what rounding takes",
            "yes": "--push sends it",
        },
        positional=15,
        settings=True,
        loads=True,
    ),
    Command(
        "estimate",
        "what a run will need in memory, before anything is loaded",
        "estimate.planner",
        CONFIG | RESUME | {"ranks": ("N", "how many processes train together, each on a GPU")},
        settings=True,
    ),
    Command(
        "lowmem",
        "write the presets of small cards",
        "lowmem",
        takes="[DIRECTORY]",
        positional=1,
    ),
    Command(
        "table",
        "base and adapter on lmms-eval's tasks",
        "table.__main__",
        ORIGIN
        | {
            "out": ("DIR", "where samples and the table go"),
            "tasks": ("drawn", "paper, drawn, or lmms-eval's names with commas between them"),
            "limit": ("64", "questions of each task"),
            "env": ("build/consumers", "the environment that lmms-eval is installed in"),
        },
        {"dry-run": "say the commands, the downloads and what is missing"},
        settings=True,
    ),
    Command(
        "doctor",
        "is this machine ready?",
        "doctor.__main__",
        {
            "run.dir": ("DIRECTORY", "where runs will go"),
            "model": ("DIRECTORY", "say its family instead, or the row that a new one needs"),
        },
        alone=True,
    ),
)
COMMANDS = {command.name: command for command in ALL}


def syntax(name: str) -> Syntax:
    """What may follow a command."""
    return COMMANDS[name].syntax


def begin(name: str, words: Sequence[str] | None = None) -> None:
    """Before a command's heavy imports: answers `--help`, and ends the process where the words
    cannot be meant or a package is missing.
    """
    code = answered(name, sys.argv[1:] if words is None else words)
    if code is not None:
        sys.exit(code)


def answered(name: str, words: Sequence[str]) -> int | None:
    """The exit code where the words need no command, since they ask for help or cannot be meant;
    None where it is to run.
    """
    missing = "" if COMMANDS[name].alone else lacking()
    if missing:  # nothing that prints may be there either
        sys.stderr.write(f"error: {missing}\n")
        return 4
    from vise_fast.system import console

    code = console.run(lambda given: check(name, given), words)
    return code if code or COMMANDS[name].syntax.parse(words).help else None


def check(name: str, words: Sequence[str]) -> None:
    """Says the page where it is asked for. Raises ConfigError for words, or a file they name, that
    cannot be meant.
    """
    from vise_fast.system.console import Console

    command = COMMANDS[name]
    given = command.syntax.parse(words)
    if given.help:
        Console().say(page(name, words))
        return
    if command.extra is not None:
        _installed(name, *command.extra)
    if command.settings:
        from vise_fast.config import origin

        config = origin.configuration(given)
        if command.loads and "dry-run" not in given.flags:
            _have(config.model.path)


def _installed(name: str, package: str, without: str) -> None:
    """Raises EnvironmentFault where the package is not there; it is not imported."""
    if importlib.util.find_spec(package.partition(">")[0]) is None:
        raise EnvironmentFault(
            f"{name} needs {package}, which is not installed; pip install '{package}', or {without}"
        )


def _have(path: str) -> None:
    """Raises EnvironmentFault for a hub id that is neither cached nor to be had."""
    if path != "nano" and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        from vise_fast.system import hub

        hub.reach(path, path)


def lacking() -> str:
    """What is not installed, why and what to do, in a line; "" where all is there."""
    absent = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if absent:
        return (
            f"packages are missing: {', '.join(absent)}; this Python ({sys.executable}) is not the "
            "one they were installed for; run make train once and use .venv/bin/python, or pip "
            "install -c constraints.txt -e ."
        )
    if importlib.util.find_spec(KERNELS) is None:
        return (
            "vise_kernels is not on Python's path; in a checkout it lies in kernels/; pip install "
            "-e . once, use the .venv that make train makes, or set PYTHONPATH=.:kernels"
        )
    return ""


# ---- pages of help -------------------------------------------------------------------------------


def page(name: str, words: Sequence[str] = ()) -> str:
    """The help of a command; where words follow --help, what has to do with them. Values are those
    that the command would use, with what else was typed.
    """
    command = COMMANDS[name]
    config = _configuration(command, words) if command.settings else None
    topics = topics_of(words)
    width = min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)
    if topics and config is not None:
        return found(topics, config, width)
    parts = [_prose(command.docstring, width), _usage(command), _options(command, width)]
    if config is not None and "resume" in command.options:
        parts += [_presets(width), _settings(config, width)]
    elif config is not None:
        parts.append(textwrap.fill(OTHERS, width))
    parts.append(_codes())
    return "\n\n".join(parts)


def topics_of(words: Sequence[str]) -> list[str]:
    """The words that follow --help, up to the next option."""
    topics: list[str] = []
    at = next((i for i, word in enumerate(words) if word in ("-h", "--help")), len(words))
    for word in words[at + 1 :]:
        if word.startswith("-"):
            break
        topics.append(word)
    return topics


def _configuration(command: Command, words: Sequence[str]) -> Config:
    """What the other words of the line make of the settings; the defaults where they are wrong."""
    from vise_fast.config import origin, schema

    topics = topics_of(words)
    others = [word for word in words if word not in ("-h", "--help", *topics)]
    try:
        return origin.configuration(command.syntax.parse(others))
    except ConfigError:
        return schema.load()


def found(topics: Sequence[str], config: Config, width: int) -> str:
    """The settings that are in a section of that name, else those that speak of every word; all of
    them for the word all.
    """
    from vise_fast.config import settings

    text = settings.help_text(type(config), width, config, topics)
    if text:
        return text
    keys = [key for key, _ in settings.fields(type(config))]
    close = settings.nearest(topics[0], [*type(config).model_fields, *keys])
    meant = f"did you mean --help {' or --help '.join(close)}?" if close else "--help all lists all"
    return f"no setting speaks of '{' '.join(topics)}'; {meant}"


def _prose(text: str, width: int) -> str:
    """Paragraphs at a width; what is indented stays as it is."""
    parts = []
    for paragraph in text.split("\n\n"):
        as_is = paragraph.startswith(" ")
        parts.append(paragraph if as_is else textwrap.fill(" ".join(paragraph.split()), width))
    return "\n\n".join(parts)


def _usage(command: Command) -> str:
    takes = f" {command.takes}" if command.takes else ""
    words = f"{takes} [options]" + (" [--section.key value …]" if command.settings else "")
    return f"usage: vise-fast {command.name}{words}\n       or python -m {_typed(command)}{words}"


def _typed(command: Command) -> str:
    """The module as it is typed after `python -m`."""
    return f"vise_fast.{command.module.split('.')[0]}"


def _options(command: Command, width: int) -> str:
    rows = {f"--{name} {shape}": meaning for name, (shape, meaning) in command.options.items()}
    rows |= {f"--{name}": meaning for name, meaning in {**command.flags, **EVERYWHERE}.items()}
    return "options\n" + _rows(rows, width)


def _presets(width: int) -> str:
    """The shipped files by name, with the first line of each."""
    return "presets for --config\n" + _rows(dict(presets()), width)


def presets() -> Iterator[tuple[str, str]]:
    """(name, what it is) of every shipped configuration."""
    from vise_fast.config.places import CONFIGS

    for path in sorted(CONFIGS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield path.stem, first.lstrip("# ").rstrip(".")


def _settings(config: Config, width: int) -> str:
    """The settings that most people change, and where the others are."""
    from vise_fast.config import settings

    rows = {}
    for key, info in settings.fields(type(config)):
        if key in FIRST:
            rows[f"--{key} {settings.bare(settings.get(config, key))}"] = info.description or ""
    sections = {name: about for name, about, _ in settings.sections(type(config))}
    return "\n".join(
        [
            "settings that most people change, with the values of this command line",
            _rows(rows, width),
            "",
            "sections of settings: --help SECTION lists one, --help WORD searches, --help all",
            _rows(sections, width),
        ]
    )


def _codes() -> str:
    return "exit codes\n" + _rows({str(code): text for code, text in EXIT_CODES.items()}, WIDEST)


def _rows(rows: Mapping[str, str], width: int) -> str:
    """Two columns; a name too long for the first has its meaning on the next line."""
    column = min(max(map(len, rows), default=0), 26)
    lines = []
    for name, meaning in rows.items():
        indent = " " * (column + 4)
        folded = textwrap.wrap(meaning, width, initial_indent=indent, subsequent_indent=indent)
        if len(name) > column or not folded:
            lines += [f"  {name}", *folded]
        else:
            lines += [f"  {name:{column}}  {folded[0][column + 4 :]}", *folded[1:]]
    return "\n".join(lines)


def spoken(name: str) -> str:
    """The command as this shell takes it: `vise-fast NAME` where that script is of this Python and
    on the path, else this Python with the module.
    """
    script = shutil.which("vise-fast")
    here = Path(sys.executable or "python")
    if script is not None and Path(script).parent.resolve() == here.parent.resolve():
        return f"vise-fast {name}"
    below = here.is_relative_to(Path.cwd())
    python = here.relative_to(Path.cwd()) if below else here
    return f"{shlex.quote(str(python))} -m {_typed(COMMANDS[name])}"


def words_after(typed: Sequence[str]) -> list[str]:
    """What a shell may offer after the words of a line that begins with vise-fast: commands, then
    options, settings and presets; files are the shell's own business.
    """
    if not typed or typed[0] not in COMMANDS:
        return list(COMMANDS)
    command = COMMANDS[typed[0]]
    if typed[-1] == "--config":
        return [name for name, _ in presets()]
    known = command.syntax
    names = (*known.options, *known.flags, *EVERYWHERE, *known.settings)
    return [f"--{name}" for name in names]


def overview() -> str:
    """All commands, for `vise-fast` without one."""
    rows = {command.name: command.about for command in ALL}
    return "\n".join(
        [
            "vise-fast: label-free training of vision-language models on one GPU",
            "",
            "usage: vise-fast COMMAND [options]   (vise-fast COMMAND --help; vise-fast --version)",
            "",
            _rows(rows, 80),
            "",
            "first steps",
            "  vise-fast train                the embedded model on drawn scenes, some minutes",
            "  vise-fast train --config qwen3-vl-2b --data.dir photos --dry-run",
            "",
            "completion",
            '  bash, zsh  eval "$(vise-fast --completion bash)"  (or zsh)',
            "  fish       vise-fast --completion fish | source",
        ]
    )
