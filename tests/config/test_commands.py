"""The commands by name: their pages of help, what is said before anything heavy is imported, and
`vise-fast`, which is all of them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from vise_fast import __main__ as all_commands
from vise_fast.config import commands, origin
from vise_fast.config.schema import load
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, EnvironmentFault

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "matplotlib", "vise_kernels")
ASK_EVERY_COMMAND = f"""
import contextlib, io, json, runpy, sys
from vise_fast.config.commands import COMMANDS
answers = {{}}
for words in (["--help"], ["--hlep"]):
    for name, command in COMMANDS.items():
        sys.argv = [name, *words]
        module = "vise_fast." + command.module.split(".")[0]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=False)
                code = None
            except SystemExit as end:
                code = end.code
        heavy = sorted({set(HEAVY)!r} & set(sys.modules))
        answers[name + words[0]] = [code, out.getvalue(), heavy]
print(json.dumps(answers))
"""


def python(*words, **environ):
    """A process of the checkout, with no more of the environment than it needs."""
    wanted = {"PATH": os.defpath, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environ
    return subprocess.run([sys.executable, *words], env=wanted, capture_output=True, text=True)


@pytest.fixture(scope="module")
def answers():
    done = python("-c", ASK_EVERY_COMMAND)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_and_typing_errors_need_nothing_heavy(name, answers):
    code, said, heavy = answers[f"{name}--help"]
    assert (code, heavy) == (0, []) and f"usage: vise-fast {name}" in said
    code, said, heavy = answers[f"{name}--hlep"]
    assert (code, heavy) == (2, []) and "did you mean --help?" in said


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_page_tells_every_word_that_may_follow(name):
    command = commands.COMMANDS[name]
    page = commands.page(name)
    for word in (*command.options, *command.flags, *commands.EVERYWHERE):
        assert f"  --{word}" in page
    assert callable(import_module(f"vise_fast.{command.module}").main)
    assert all(f"  {code} " in page for code in ("2", "3", "4", "5", "6", "129/130/143"))


def test_the_readme_and_the_pages_tell_the_same_exit_codes():
    line = next(x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("Exit"))
    codes = re.findall(r"(\d[\d/]*) ", line)
    assert codes == [str(code) for code in commands.EXIT_CODES if code != 0]


@pytest.mark.parametrize(
    "words",
    [[], ["--config", "qwen3-vl-2b"], ["--reward.preset", "paper"], ["--train.steps=7"]],
    ids=" ".join,
)
def test_values_shown_are_those_of_the_command_line(words):
    page = commands.page("train", [*words, "--help"])
    config = origin.configuration(commands.syntax("train").parse(words))
    assert f"--train.steps {config.train.steps} " in page
    assert f"--train.lr {config.train.lr:g} " in page
    every = commands.page("train", [*words, "--help", "all"])
    assert f"--rollout.samples {config.rollout.samples}\n" in every


def test_the_embedded_model_trains_with_what_its_page_says():
    assert "--train.steps 200 " in commands.page("train")
    assert "--train.lr 0.0007 " in commands.page("train")


def test_help_of_a_section_of_a_word_and_of_nothing():
    section = commands.page("train", ["--help", "reward"])
    assert section.startswith("reward: ") and "--reward.gate" in section
    assert "--train.steps" not in section
    searched = commands.page("train", ["--help", "8-bit"])
    assert "--optim.name" in searched and "--train.steps" not in searched
    both = commands.page("train", ["--help", "learning", "peak"])
    assert "--train.lr" in both and both.count("\n  --") == 1
    assert "did you mean --help reward?" in commands.page("train", ["--help", "rewrd"])
    assert len(commands.page("train", ["--help", "all"]).splitlines()) > 200


@pytest.mark.parametrize("columns", ["80", "200"])
def test_pages_fit_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    page = commands.page("train")
    own = [line for line in page.splitlines() if not line.startswith(("usage", "       or"))]
    assert max(map(len, own)) <= min(int(columns), commands.WIDEST)


def test_a_preset_by_name_is_listed_and_loads():
    listed = dict(commands.presets())
    assert {"nano", "qwen3-vl-2b", "paper", "lowmem-8gb"} <= set(listed)
    page = commands.page("train")
    for name in listed:
        assert f"  {name} " in page and load(name) == load(ROOT / "configs" / f"{name}.yaml")


# ---- vise-fast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(words, capsys):
    assert console.run(all_commands.main, words) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in commands.COMMANDS)


def test_a_command_by_name_is_that_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert console.run(all_commands.main, ["report", "nowhere"]) == 3
    assert "nowhere" in capsys.readouterr().err
    assert console.run(all_commands.main, ["trian"]) == 2
    assert "did you mean vise-fast train?" in capsys.readouterr().err
    assert console.run(all_commands.main, ["--version"]) == 0
    assert re.match(r"vise_fast \d", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "typed, offered, other",
    [
        ("vise-fast tr", ["train"], ["report"]),
        ("vise-fast train --re", ["--resume", "--reward.gate"], ["--out"]),
        ("vise-fast train --config qwen3-vl-2", ["qwen3-vl-2b"], ["nano"]),
        ("vise-fast compare --", ["--out"], ["--train.lr"]),
    ],
)
def test_bash_completes_commands_settings_and_presets(typed, offered, other, tmp_path, capsys):
    assert console.run(all_commands.main, ["--completion"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "vise-fast").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vise_fast "$@"\n')
    (tmp_path / "vise-fast").chmod(0o755)
    line = typed.split(" ")
    asked = (
        f"{script}\nCOMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; _vise_fast; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    wanted = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    done = subprocess.run(["bash", "-c", asked], env=wanted, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert set(offered) <= set(found) and not set(other) & set(found), done.stderr
    assert all(word.startswith(line[-1]) for word in found)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_too(shell, tmp_path, capsys):
    assert console.run(all_commands.main, ["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert "vise-fast --words" in script and "COMP_WORDS" not in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_a_shell_without_completion_is_one_line(capsys):
    assert console.run(all_commands.main, ["--completion", "tcsh"]) == 2
    said = capsys.readouterr().err
    assert "'tcsh'" in said and "bash, zsh, fish" in said and said.count("\n") == 1


def test_a_command_is_spoken_as_this_shell_takes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripts = tmp_path / "my env" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "vise-fast"):
        (scripts / name).write_text("")
        (scripts / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", str(scripts))
    assert commands.spoken("infer") == "vise-fast infer"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.spoken("infer") == "'my env/bin/python' -m vise_fast.infer"
    monkeypatch.chdir(scripts)
    assert commands.spoken("infer") == "python -m vise_fast.infer"
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setenv("PATH", str(scripts))  # somebody else's
    assert commands.spoken("infer") == "usr/bin/python3 -m vise_fast.infer"


def test_the_console_script_is_what_pyproject_names():
    text = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'vise-fast = "([\w.]+):(\w+)"', text).groups()
    assert getattr(import_module(module), function) is all_commands.run


# ---- a Python that cannot run it -----------------------------------------------------------------


def test_packages_and_kernels_that_are_not_there_are_one_line():
    done = python("-S", "-m", "vise_fast.train")
    assert done.returncode == 4 and not done.stdout
    assert done.stderr.startswith("error: packages are missing: numpy") and "make" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_its_library_a_command_ends_before_it_begins(monkeypatch):
    """`demo` needs one that no other command does."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EnvironmentFault, match="pip install 'gradio>=5', or use"):
        commands.check("demo", [])


def test_a_forgotten_path_is_one_line(monkeypatch):
    monkeypatch.setattr(commands, "KERNELS", "vise_kernels_of_nobody")
    assert "PYTHONPATH=.:kernels" in commands.lacking() and "\n" not in commands.lacking()


def test_an_old_python_is_one_line():
    code = "import sys; sys.version_info = (3, 9, 1); import vise_fast"
    done = python("-c", code)
    assert done.returncode == 4 and "3.11 or newer" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


# ---- what a file and a preset say ----------------------------------------------------------------


def notes(*words):
    return list(origin.preset_notes(commands.syntax("train").parse(list(words))))


def test_a_preset_over_a_file_says_what_the_file_still_decides(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train: {batch: 8, steps: 5}\nreward: {w_geo: 0.5, soft: true}\n")
    config = ["--config", str(file)]
    (note,) = notes(*config, "--reward.preset", "paper")
    assert "train.batch 8 (1)" in note and "reward.soft true (false)" in note
    assert "train.steps" not in note and "w_geo" not in note  # not the preset's; the same
    assert "train.batch" not in notes(*config, "--reward.preset=paper", "--train.batch=8")[0]
    (note,) = notes(*config, "--reward.preset", "robust")
    assert "reward.w_geo 0.5 (1.0)" in note and "train.batch" not in note
    assert notes(*config) == [] == notes("--reward.preset", "paper")


@pytest.mark.parametrize(
    "text, line",
    [
        ("train:\n  steps:5\n", 2),
        ("train:\n  lr: 1e-3\n  steps:5\n  batch: 2\n", 3),
        ("train:{steps: 5}\n", 1),
    ],
)
def test_a_colon_without_a_space_is_explained(tmp_path, text, line):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError) as fault:
        load(tmp_path / "my.yaml")
    assert f"line {line} has no space after the colon" in str(fault.value)
    assert re.search(r"write '(steps: 5|train: \{steps: 5\})'", str(fault.value))
