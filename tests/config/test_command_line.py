"""The command line: own options, flags, settings, and where the configuration comes from."""

import json
import subprocess
import sys
from contextlib import chdir
from importlib import import_module

import pytest

from vise_fast.config import origin
from vise_fast.config import schema as config
from vise_fast.config.command_line import Syntax
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, EnvironmentFault

SOME = Syntax(
    options={"json": "FILE", "adapter": "RUN/adapter", "scenes": "64"},
    flags=("dry-run",),
    positional=1,
    settings=origin.SETTINGS,
)
BARE = Syntax(options={"scenes": "64"})


def test_options_flags_settings_and_places_are_told_apart():
    found = SOME.parse(
        ["RUN", "--json=a b", "--train.lr", "1e-3", "--adapter", "x", "--dry-run", "--run.report"]
    )
    assert (found["json"], found["adapter"], found["scenes"]) == ("a b", "x", None)
    assert found.positional == ["RUN"] and found.flags == {"dry-run"} and not found.help
    assert found.settings == ["--train.lr=1e-3", "--run.report"]


def test_a_flag_takes_no_word_that_follows_it():
    found = SOME.parse(["--debug", "RUN", "--dry-run", "--train.lr=a=b"])
    assert found.positional == ["RUN"] and found.flags == {"debug", "dry-run"}
    assert found.settings == ["--train.lr=a=b"]


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--scnes", "--help", "a", "b"]])
def test_help_is_all_that_is_wanted(words):
    found = SOME.parse(words)
    assert found.help and not found.settings and set(found.values.values()) == {None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scens", "3"], "unknown option --scens; did you mean --scenes?"),
        (["--zzz"], "known: --scenes"),
        (["--train.lr", "3"], "known: --scenes"),
        (["--"], "known: --scenes"),
        (["--scenes"], "--scenes has no value; write --scenes 64"),
        (["--scenes", "--x"], "no value"),
        (["--debug=yes"], "--debug=yes has a value; write --debug"),
        (["stray"], "unexpected word 'stray'; known: --scenes"),
        (["scenes"], "unexpected word 'scenes'; did you mean --scenes?"),
        (["-scenes", "3"], "did you mean --scenes?"),
        (["--hlep"], "did you mean --help?"),
    ],
)
def test_faults_say_what_to_write(words, said):
    with pytest.raises(ConfigError) as fault:
        BARE.parse(words)
    assert said in str(fault.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "3"], "did you mean --train.steps?"),
        (["--seed", "3"], "did you mean --train.seed or --eval.seed?"),
        (["--scens", "3"], "did you mean --scenes?"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["RUN", "train.steps"], "did you mean --train.steps?"),
        (["RUN", "more"], "known: --json, --adapter, --scenes, --dry-run, --help, --debug, and"),
        (["--qqq"], "settings as --section.key value"),
    ],
)
def test_where_settings_are_welcome_they_may_have_been_meant(words, said):
    with pytest.raises(ConfigError) as fault:
        SOME.parse(words)
    assert said in str(fault.value)


@pytest.mark.parametrize("text", ["x", "-3", "1.5", ""])
def test_counts_are_whole_numbers(text):
    with pytest.raises(ConfigError, match="whole number"):
        BARE.parse([f"--scenes={text}"]).count("scenes")


def test_a_count():
    assert BARE.parse(["--scenes", "12"]).count("scenes") == 12
    assert BARE.parse([]).count("scenes") is None


def test_words_are_read_without_any_package():
    """The doctor's first words, on a machine where pydantic is broken."""
    code = (
        "import sys, vise_fast.config.command_line;"
        "print({'pydantic', 'yaml', 'torch', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# -- every command ---------------------------------------------------------------------------------

COMMANDS = {
    "train": "train",
    "evaluate": "evaluate.__main__",
    "infer": "infer",
    "merge": "merge",
    "export": "export.__main__",
    "table": "table.__main__",
    "report": "report.__main__",
    "estimate": "estimate.__main__",
    "lowmem": "lowmem",
    "doctor": "doctor.__main__",
}


@pytest.mark.parametrize("help", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_does_and_does_nothing(command, help, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = import_module(f"vise_fast.{COMMANDS[command]}").main
    assert console.run(main, [help, "--debug"]) == 0
    out, err = capsys.readouterr()
    assert f"python -m vise_fast.{command}" in out and not err
    assert not list(tmp_path.iterdir())


def test_a_folder_alone_is_said_to_be_the_pictures(tmp_path):
    with pytest.raises(ConfigError, match="named as --data.dir 'my photos'"), chdir(tmp_path):
        (tmp_path / "my photos").mkdir()
        SOME.parse(["RUN", "my photos"])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_unknown_words(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = import_module(f"vise_fast.{COMMANDS[command]}").main
    assert console.run(main, ["--hlep"]) == 2
    assert "did you mean --help?" in capsys.readouterr().err
    assert console.run(main, ["a", "b", "--debug"]) == 2
    out, err = capsys.readouterr()
    assert "unexpected word" in err and "Traceback" in err and not out
    assert not list(tmp_path.iterdir())


# -- the configuration -----------------------------------------------------------------------------


def test_resuming_is_short_for_a_setting():
    syntax = Syntax(options={"config": "FILE.yaml", "resume": "auto"}, settings=origin.SETTINGS)
    given = syntax.parse(["--resume=x=y", "--train.steps", "5"])
    found = origin.configuration(given, ["--train.steps=3", "--eval.scenes=2"])
    assert (found.train.resume, found.train.steps, found.eval.scenes) == ("x=y", 5, 2)
    assert origin.configuration(syntax.parse([])).train.resume is None


def adapter(directory, base):
    (directory / "adapter").mkdir(parents=True)
    (directory / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": base})
    )
    return str(directory / "adapter")


def configuration(*words):
    syntax = Syntax(options=origin.OPTIONS, settings=origin.SETTINGS)
    return origin.configuration(syntax.parse(words))


def test_an_adapter_in_a_run_brings_the_runs_settings_and_the_command_line_wins(tmp_path):
    where = adapter(tmp_path, "org/other")
    (tmp_path / "config.yaml").write_text(
        config.to_yaml(
            config.load(None, ["--model.path=org/base", "--eval.scenes=7", "--scenes.size=64"])
        )
    )
    found = configuration("--adapter", where, "--scenes.size", "96")
    assert (found.model.path, found.eval.scenes, found.scenes.size) == ("org/base", 7, 96)
    assert configuration("--adapter", where, "--model", "org/third").model.path == "org/third"


def test_a_lone_adapter_brings_the_base_it_names(tmp_path):
    assert configuration("--adapter", adapter(tmp_path, "org/base")).model.path == "org/base"


def test_the_embedded_base_is_found_wherever_it_was_installed(tmp_path):
    found = configuration("--adapter", adapter(tmp_path, "/somewhere/site-packages/vise_fast/nano"))
    assert (
        found.model.path == "nano"
        and found.data.max_pixels == config.load(None, []).data.max_pixels
    )


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\x00", ""])
def test_a_damaged_adapter_is_an_environment_fault(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(EnvironmentFault, match="no JSON"):
        configuration("--adapter", str(tmp_path))


@pytest.mark.parametrize("base", [7, [], {}, True, ""])
def test_a_base_that_is_no_name_is_none(tmp_path, base):
    found = configuration("--adapter", adapter(tmp_path, base))
    assert found.model.path == "nano"
