"""Odd values against every type of setting, from a file and from the command line: taken whole, so
that a run can be resumed with them, or refused in one line. And files that are more than they seem.
"""

import os
import threading

import pytest
import yaml

from vise_fast import infer, merge, train
from vise_fast.config import settings
from vise_fast.config.schema import Config, load
from vise_fast.estimate import __main__ as estimate
from vise_fast.evaluate import __main__ as evaluate
from vise_fast.report import __main__ as report
from vise_fast.system import console
from vise_fast.system.errors import ConfigError

FIELDS = dict(settings.fields(Config))
OTHER_BASE = "--model.path=some/base"  # the embedded model's own file is not read each time
HUGE = {
    "ten to the 400": "1" + "0" * 400,
    "minus ten to the 400": "-1" + "0" * 400,
    "hexadecimal": "0x" + "f" * 6000,
    "digits": "7" * 6000,
    "seed": str(2**64),
    "float": "1e300",
    "float as YAML writes it": "1.0e+300",
    "list": "[1.0e+300, 1.0e+300]",
    "list of digits": f"[0, {'7' * 400}]",
    "list of hexadecimals": f"[0x{'f' * 6000}, 1]",
    "infinity": ".inf",
    "minus infinity": "-.inf",
    "not a number": ".nan",
    "list of infinities": "[.inf, .inf]",
}
UNNAMEABLE = {
    "null character": '"a\\0b"',
    "escape": '"\\e[2J"',
    "two lines": '"a\\nb"',
    "long name": "x" * 300,
    "long name of few letters": "é" * 200,
    "long path": "x/" * 2500,
}
ODD = {
    "nothing": "",
    "null": "null",
    "minus zero": "-0.0",
    "tiny": "1.0e-320",
    "yes": "yes",
    "date": "2024-01-01",
    "moment": "2024-01-01 10:00:00",
    "sixties": "1:30:00",
    "octal": "0o17",
    "bytes": "!!binary aGVsbG8=",
    "set": "!!set {a, b}",
    "pairs": "!!omap [a: 1]",
    "mapping": "{a: {b: {c: 1}}}",
    "list of lists": "[[[[1]]]]",
    "long list": f"[{', '.join(['1'] * 500)}]",
    "deep list": "[" * 3000,
    "deep and closed": "[" * 3000 + "]" * 3000,
    "alias of itself": "&a [*a]",
    "alias of nothing": "*a",
    "object": "!!python/object/apply:os.system [ls]",
    "tab": "\t1",
    "colon": "a: b: c",
    "letters of other scripts": "снимки/写真",
    "right to left": "\u202eabc",
    "long text": "x" * 10**5,
}
ALL = HUGE | UNNAMEABLE | ODD
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


def outcome(path, words) -> Config | str:
    """The configuration, or the one line that says why not."""
    try:
        return load(path, words)
    except ConfigError as fault:
        said = str(fault)
        assert fault.code == 2 and said and "\n" not in said and len(said) < 600
        return said


def from_both(key, text, tmp_path):
    """What a value becomes in a file and as a word."""
    section, name = key.split(".")
    file = tmp_path / "odd.yaml"
    file.write_text(f"{section}:\n  {name}: {text}\n")
    other = [] if key == "model.path" else [OTHER_BASE]
    return outcome(file, other), outcome(None, [*other, f"--{key}={text}"])


def is_number(key) -> bool:
    kind = str(FIELDS[key].annotation)
    return "int" in kind or "float" in kind


OF_EACH_TYPE = {str(field.annotation): key for key, field in FIELDS.items()}.values()


@pytest.mark.parametrize("key", OF_EACH_TYPE)
def test_an_odd_value_is_taken_whole_or_refused(key, tmp_path):
    section, name = key.split(".")
    again = tmp_path / "again.yaml"
    for odd, text in ALL.items():
        for taken in from_both(key, text, tmp_path):
            if isinstance(taken, Config):
                value = taken.model_dump(mode="json")[section][name]
                again.write_bytes(yaml.safe_dump({section: {name: value}}).encode())
                assert settings.get(load(again, [OTHER_BASE]), key) == value, odd
                assert len(settings.show(value).splitlines()) == 1


@pytest.mark.parametrize("key", [key for key in FIELDS if is_number(key)])
def test_a_number_too_large_is_refused(key, tmp_path):
    for name, text in HUGE.items():
        for said in from_both(key, text, tmp_path):
            assert isinstance(said, str) and said.startswith(key), name


TEXTS = [key for key, field in FIELDS.items() if field.annotation in (str, str | None)]


@pytest.mark.parametrize("key", TEXTS)
def test_a_text_that_cannot_be_a_name_is_refused(key, tmp_path):
    for name, text in UNNAMEABLE.items():
        for said in from_both(key, text, tmp_path):
            # as a word the quotes and the escapes inside them are letters
            if not (isinstance(said, Config) and text.startswith('"')):
                assert isinstance(said, str) and said.startswith(key), name
        assert isinstance(from_both(key, text, tmp_path)[0], str), name


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize("letter", ["\0", "\x1b", "\udcff", "\ud800"])
def test_letters_that_are_no_text_are_refused(key, letter):
    """A word of a command line that is not UTF-8 arrives with such letters."""
    other = [] if key == "model.path" else [OTHER_BASE]
    said = outcome(None, [*other, f"--{key}=photos{letter}"])
    assert isinstance(said, str) and said.startswith(key) and "UTF-8" in said


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1])
def test_any_seed_that_torch_takes_is_taken(seed):
    assert load(None, [f"--train.seed={seed}"]).train.seed == seed


# -- whole files -----------------------------------------------------------------------------------

BOMBS = {
    "laughs": (LAUGHS, "alias *a0"),
    "laughs in a value": ("train:\n" + "".join(f"  {r}" for r in LAUGHS.splitlines(True)), "alias"),
    "merged": ("a: &a {b: 1}\ntrain:\n  <<: *a\n", "alias *a"),
    "deep": ("[" * 100_000, "10 levels"),
    "deep by indentation": ("".join(" " * n + "a:\n" for n in range(500)), "10 levels"),
    "large": ("# nothing\n" * 200_000, "larger than 1 MiB"),
    "latin 1": ("data:\n  dir: café\n".encode("latin-1"), "not UTF-8"),
    "UTF-16": ("train:\n  steps: 5\n".encode("utf-16"), "not UTF-8"),
    "long key": ("k" * 900 + ": 1\n", "unknown key 'kkk"),
    "longer key": ("? " + "k" * 10**5 + "\n: 1\n", "unknown key 'kkk"),
    "number as a key": ("? 0x" + "f" * 6000 + "\n: 1\n", "unknown key 'a number"),
    "number as a name": ("train:\n  ? 0x" + "f" * 6000 + "\n  : 1\n", "'train.a number"),
    "no date": ("data:\n  dir: 2024-13-45\nrun:\n  dir: [2024-13-45]\n", "run.dir cannot be"),
    "long key, twice": (("  " + "k" * 900 + ": 1\n").join(["train:\n", "", ""]), "twice"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_is_more_than_it_seems(name, tmp_path):
    text, part = BOMBS[name]
    file = tmp_path / "bomb.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    said = outcome(file, [])
    assert isinstance(said, str) and part in said


@pytest.mark.parametrize("name", ["\0", "x" * 300, "no\udcffthing", "a/" * 3000, "/dev/zero"])
def test_a_configuration_that_no_file_can_be(name):
    assert isinstance(outcome(name, []), str)


def test_a_pipe_may_be_a_configuration(tmp_path):
    """As a shell's `<(...)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("train:\n  steps: 7\n",))
    writer.start()
    assert load(pipe, []).train.steps == 7
    writer.join()


@pytest.mark.parametrize(
    "word",
    [
        f"--train.seed={2**64}",
        f"--train.steps={'9' * 400}",
        "--train.lr=1e300",
        "--train.lr=nan",
        "--update.tau=inf",
        f"--data.dir={'x' * 300}",
        "--data.dir=photos\udcff",
        f"--run.dir={'x' * 300}",
        f"--model.path={'x' * 300}",
        f"--config={'x' * 300}",
        f"--resume={'x' * 300}",
        f"--lora.init_from={'x' * 300}",
        f"--reward.plugin={'x' * 300}.py",
        f"--view.scale={'{a: &a [x,x], b: [*a,*a]}'}",
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_the_trainer_says_one_line(word, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert console.run(train.main, [word, *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


LONG = "x" * 300
COMMANDS = {
    "evaluate": (evaluate.main, ["--adapter", LONG]),
    "merge": (merge.main, ["--adapter", LONG, "--out", "merged"]),
    "merge into": (merge.main, ["--adapter", "adapter", "--out", LONG]),
    "infer": (infer.main, ["--adapter", LONG, "--image", "photo.jpg"]),
    "report": (report.main, [LONG]),
    "estimate": (estimate.main, ["--config", LONG]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_one_line_to_a_long_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main, words = COMMANDS[name]
    assert console.run(main, words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
