"""What a person sees and what a run leaves in lines: escapes, tables, progress, JSON lines, loggers
that fail.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vise_fast.system import console as module
from vise_fast.system.console import Console, JsonLines, counted, duration, figure, read_lines, run
from vise_fast.system.errors import (
    ConfigError,
    DataError,
    EnvironmentFault,
    MemoryFloor,
    NumericFault,
    UserError,
)
from vise_fast.system.loggers import KINDS, Loggers


class Screen(io.StringIO):
    """A stream that says whether it is a terminal and which letters it has."""

    def __init__(self, terminal: bool = False, encoding: str = "utf-8"):
        super().__init__()
        self.terminal = terminal
        self.letters = encoding

    def isatty(self) -> bool:
        return self.terminal

    @property
    def encoding(self) -> str:
        return self.letters


def shown(text: str, encoding: str = "utf-8") -> str:
    screen = Screen(encoding=encoding)
    Console(screen, screen).say(text)
    return screen.getvalue()


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "[bold]x[/bold]",
        "[/]",
        "[red",
        "]",
        ":smile: :warning:",
        "<query> a [link=http://x] </query>",
        "[[1,2],[3,4]]",
        "\\[bold]",
        "a  b",
        "é 漢字 ✓",
        "100% {x} {}",
    ],
)
def test_texts_are_shown_as_they_are(text):
    assert shown(text) == text + "\n"


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb", "a\\rb"),
        ("\x07", "\\x07"),
        ("\x00", "\\x00"),
        ("a\tb", "a\\tb"),
        ("\u202eabc", "\\u202eabc"),
        ("\udcff", "\\udcff"),
        ("\x9b1m", "\\x9b1m"),
        ("a\nb", "a\nb"),
    ],
)
def test_control_codes_are_escaped(text, wanted):
    assert shown(text) == wanted + "\n"


def test_letters_the_terminal_lacks_are_escaped():
    assert shown("é ✓", "ascii") == "\\xe9 \\u2713\n"
    assert shown("é ✓", "latin-1") == "é \\u2713\n"


def test_long_lines_are_not_folded():
    assert shown("word " * 200) == "word " * 200 + "\n"


def test_complaints_go_to_standard_error():
    out = Screen()
    err = Screen()
    console = Console(out, err)
    console.warn("careful")
    console.error(DataError("no images; why; what to do"))
    assert (
        out.getvalue() == ""
        and err.getvalue() == "warning: careful\nerror: no images; why; what to do\n"
    )


def test_an_error_is_one_line_and_a_traceback_only_on_request():
    for debug in (False, True):
        err = Screen()
        try:
            raise ConfigError("first\nsecond   third")
        except ConfigError as fault:
            Console(Screen(), err).error(fault, debug)
        assert err.getvalue().endswith("error: first second third\n")
        assert ("Traceback" in err.getvalue()) == debug


def test_alarms_speak_when_they_change():
    err = Screen()
    console = Console(Screen(), err)
    for said in (None, "area 0.9", "area 0.95", None, None, "area 0.8"):
        console.alarm("area", said)
    console.alarm("parse", "parse rate 0.2")
    assert err.getvalue().splitlines() == [
        "alarm: area 0.9",
        "alarm over: area",
        "alarm: area 0.8",
        "alarm: parse rate 0.2",
    ]


# -- tables and figures ----------------------------------------------------------------------------


def test_a_table_holds_every_cell():
    screen = Screen()
    Console(screen, screen).table(
        "Before [b]and[/b] after",
        ["", "before", "after"],
        [["IoU", 0.41234, 0.5], ["[red]n", 12, None]],
    )
    text = screen.getvalue()
    assert all(
        part in text
        for part in ("Before [b]and[/b] after", "before", "0.4123", "0.5", "[red]n", "12", "-")
    )


def test_a_wide_table_is_not_cut_without_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    Console(screen, screen).table(
        "", ["a long name of a column"] * 6, [[f"value number {i}" for i in range(6)]]
    )
    assert all(f"value number {i}" in screen.getvalue() for i in range(6))


def test_a_row_of_a_very_wide_table_stays_on_one_line_without_a_terminal():
    screen = Screen()
    Console(screen, screen).table("", ["", *"abcdefgh"], [["row", *["a value of some length"] * 8]])
    assert screen.getvalue().count("\n") == 3


def test_a_table_on_an_ascii_terminal():
    screen = Screen(encoding="ascii")
    Console(screen, screen).table("é", ["a"], [["✓"]])
    assert screen.getvalue().isascii() and "\\u2713" in screen.getvalue()


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (0.0, "0"),
        (0.5, "0.5"),
        (0.123456, "0.1235"),
        (1234.5, "1234"),
        (123456.0, "1.23e+05"),
        (1e-6, "1.00e-06"),
        (-0.25, "-0.25"),
        (7, "7"),
        (True, "True"),
        ("x", "x"),
        (float("nan"), "nan"),
    ],
)
def test_figures(value, text):
    assert figure(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (-3, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (60, "1m00s"),
        (200, "3m20s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (360_000, "100h00m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_one_thing_is_no_plural():
    assert [counted(n, "update") for n in (0, 1, 2)] == ["0 updates", "1 update", "2 updates"]


# -- progress --------------------------------------------------------------------------------------


def test_plain_progress_speaks_at_first_at_last_and_in_between():
    screen = Screen()
    now = [0.0]
    console = Console(screen, screen)
    lines = module._Lines(console, total=100, label="train", done=0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] = step * 2.0
        lines.advance({"reward": step / 100})
    said = screen.getvalue().splitlines()
    assert said[0] == "train 1/100  ETA 3m18s  reward 0.01"
    assert said[1] == "train 6/100  ETA 3m08s  reward 0.06"
    assert said[-1] == "train 100/100  ETA 0s  reward 1" and len(said) == 21


def test_the_eta_of_a_resumed_run_counts_its_own_steps():
    screen = Screen()
    now = [0.0]
    lines = module._Lines(
        Console(screen, screen), total=100, label="train", done=90, clock=lambda: now[0]
    )
    now[0] = 3.0
    lines.advance({})
    assert screen.getvalue() == "train 91/100  ETA 27s\n"


def test_progress_without_a_terminal_has_no_codes():
    screen = Screen()
    with Console(screen, screen).progress(2, "train [x]") as advance:
        advance({"KL": 0.001})
        advance({"KL": 0.002})
    assert (
        screen.getvalue().splitlines()[0].startswith("train [x] 1/2")
        and "\x1b" not in screen.getvalue()
    )


def test_progress_on_a_terminal_shows_figures():
    screen = Screen(terminal=True)
    console = Console(screen, screen, plain=False)
    with console.progress(3, "train [x]", done=1) as advance:
        advance({"reward": 0.25})
        console.alarm("area", "area 0.9")
        advance({"reward": 0.75})
    text = screen.getvalue()
    assert (
        "train [x]" in text
        and "3/3" in text
        and "reward 0.75" in text
        and "alarm: area 0.9" in text
    )


def drawn(width: int, monkeypatch) -> list[str]:
    """The lines of a live bar on a terminal of that width, without their codes."""
    monkeypatch.setenv("COLUMNS", str(width))
    screen = Screen(terminal=True)
    console = Console(screen, screen, plain=False)
    figures = {"reward": 0.25, "kl": 1.5e-5, "area": 0.125, "parse_rate": 1.0, "images_per_s": 2.5}
    with console.progress(200, "train", done=39) as advance:
        advance(figures)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if "train" in line]


@pytest.mark.parametrize("width, shown", [(80, 2), (120, 5), (45, 0)])
def test_a_live_bar_keeps_bar_step_and_time_and_the_figures_that_fit(width, shown, monkeypatch):
    line = drawn(width, monkeypatch)[-1]
    assert "━" in line and "40/200" in line and "ETA" in line and "…" not in line
    names = ("reward", "kl", "area", "parse_rate", "images_per_s")
    assert [name in line for name in names] == [n < shown for n in range(5)]
    assert len(line.rstrip()) <= width


def test_figures_that_fit_are_whole_and_the_first():
    figures = {"reward": 0.25, "kl": 0.5, "a": 1.0}
    whole = "reward 0.25  kl 0.5  a 1"
    for room in range(40):
        said = module.fitting(figures, room)
        assert len(said) <= room and whole.startswith(said)
    assert module.fitting(figures, len(whole)) == whole
    assert module.fitting(figures, len(whole) - 1) == "reward 0.25  kl 0.5"


@pytest.mark.parametrize("terminal", [False, True])
def test_things_pass_through_a_bar(terminal):
    screen = Screen(terminal)
    console = Console(screen, screen, plain=not terminal)
    assert list(console.through(range(5), "reading")) == [0, 1, 2, 3, 4]
    assert list(console.through([], "reading")) == []
    assert ("reading" in screen.getvalue()) == terminal  # lines only once it takes long


def test_things_that_take_long_are_lines_without_a_terminal(monkeypatch):
    screen = Screen()
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(module._Lines.__init__, "__defaults__", (lambda: float(next(now)),))
    list(Console(screen, screen).through(range(9), "reading"))
    said = screen.getvalue().splitlines()
    assert [line.split("  ")[0] for line in said] == ["reading 3/9", "reading 6/9", "reading 9/9"]


@pytest.mark.parametrize("terminal", [False, True])
def test_things_of_an_unknown_number_are_counted(terminal, monkeypatch):
    """On a terminal while it goes on; elsewhere a line where ten seconds have passed."""
    screen = Screen(terminal)
    console = Console(screen, screen, plain=not terminal)
    monkeypatch.setattr(module, "SOME", 100)
    now = iter(range(0, 10**6, 4))
    if not terminal:
        monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    assert list(console.through(iter(range(1_250)), "listing files")) == list(range(1_250))
    assert list(console.through(iter(()), "listing files")) == []
    if terminal:
        assert "listing files" in screen.getvalue()
    else:
        said = screen.getvalue().splitlines()
        assert said == [f"listing files {number:,}" for number in (300, 600, 900, 1_200)]


def test_things_pass_below_a_live_bar_which_stays(monkeypatch):
    """An evaluation within a run: one screen holds one live display."""
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen(terminal=True)
    console = Console(screen, screen, plain=False)
    with console.progress(2, "train") as advance:
        advance({})
        for done in console.through(range(3), "evaluate"):
            console._live.refresh()  # else it draws when its time comes
            assert done == console._live.tasks[-1].completed
        advance({})
        with pytest.raises(NumericFault):
            for _ in console.through(range(3), "broken off"):
                raise NumericFault("x")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).split("\n")
    drawn = [part for line in lines for part in line.split("\r")]
    assert any(part.startswith("evaluate") and "2/3  ETA" in part for part in drawn)
    assert "2/2" in drawn[-1] + drawn[-2] and max(map(len, drawn)) <= 80
    assert list(console.through([1], "after")) == [1]  # a bar of its own again


def test_a_sign_of_life_says_what_is_done_and_goes():
    screen = Screen(terminal=True)
    with Console(screen, screen, plain=False).working("loading the model"):
        pass
    assert "loading the model … 0s" in screen.getvalue() and "\x1b[2K" in screen.getvalue()
    screen = Screen()
    with Console(screen, screen).working("loading the model"):
        pass
    assert screen.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_ends_cleanly_when_the_work_fails(terminal):
    screen = Screen(terminal)
    console = Console(screen, screen, plain=not terminal)
    with pytest.raises(NumericFault), console.progress(3, "train") as advance:
        advance({})
        raise NumericFault("x")
    assert "\x1b[?25h" in screen.getvalue() if terminal else True  # the cursor is back


def test_a_reader_that_goes_away_does_not_end_the_run():
    code = (
        "import sys, time\nfrom vise_fast.system.console import Console\nc = Console()\n"
        "for i in range(300):\n    c.say('x' * 1000)\nprint('still here', "
        "file=sys.stderr)\nsys.stderr.flush()\nimport os\nos._exit(0)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait() == 0 and "still here" in said and "Traceback" not in said


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, code",
    [
        (ConfigError, 2),
        (DataError, 3),
        (EnvironmentFault, 4),
        (MemoryFloor, 5),
        (NumericFault, 6),
        (UserError, 1),
    ],
)
def test_exit_codes(capsys, kind, code):
    def main(words):
        raise kind("what; why; what to do")

    assert run(main, []) == code
    assert capsys.readouterr() == ("", "error: what; why; what to do\n")
    assert run(main, ["--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_command_that_ends_well(capsys):
    assert (
        run(lambda words: None, []) == 0
        and run(lambda words: 143, []) == 143
        and run(lambda words: len(words), ["a", "b"]) == 2
    )
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_command(capsys):
    def main(words):
        raise KeyboardInterrupt

    assert run(main, []) == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_our_own_faults_keep_their_traceback():
    def main(words):
        raise AssertionError("a bug")

    with pytest.raises(AssertionError):
        run(main, [])


# -- JSON lines ------------------------------------------------------------------------------------


def test_lines_are_on_disk_at_once(tmp_path):
    with JsonLines(tmp_path / "deep" / "metrics.jsonl") as metrics:
        metrics.write({"step": 1, "reward": 0.5, "text": "é\n[bold]"})
        assert read_lines(tmp_path / "deep" / "metrics.jsonl") == [
            {"step": 1, "reward": 0.5, "text": "é\n[bold]"}
        ]
        metrics.write({"step": 2})
    assert (tmp_path / "deep" / "metrics.jsonl").read_text().count("\n") == 2


def test_numbers_without_a_word_in_json_become_null(tmp_path):
    with JsonLines(tmp_path / "m.jsonl") as metrics:
        metrics.write(
            {"a": float("nan"), "b": [float("inf"), 1.0], "c": {"d": -float("inf")}, "e": (1, 2)}
        )
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None},
        "e": [1, 2],
    }


@pytest.mark.parametrize(
    "tail",
    [
        '{"step": 4, "rew',
        '{"step": 4}',
        "\x00\x00\x00",
        "{",
        "null",
        "\n",
        '"text"\n',
        "garbage\n",
        '{"step": 3}\n{"st',
    ],
)
def test_a_line_cut_short_is_dropped(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    with JsonLines(path, last_step=3) as metrics:
        metrics.write({"step": 4})
    steps = [record["step"] for record in read_lines(path)]
    assert steps in ([1, 2, 3, 4], [1, 2, 3, 3, 4]) and len(path.read_text().splitlines()) == len(
        steps
    )


@pytest.mark.parametrize(
    "last, kept", [(None, [1, 2, 3, 4, 5]), (0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])]
)
def test_a_resume_cuts_what_it_will_write_again(tmp_path, last, kept):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    JsonLines(path, last_step=last).close()
    assert [record["step"] for record in read_lines(path)] == kept


def test_records_without_a_step_stay(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "before"}\n{"step": 5}\n')
    JsonLines(path, last_step=2).close()
    assert read_lines(path) == [{"kind": "before"}]


def test_a_whole_file_is_not_rewritten(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    inode = path.stat().st_ino
    JsonLines(path, last_step=1).close()
    assert path.stat().st_ino == inode


def test_a_kill_while_cutting_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        JsonLines(path, last_step=1)
    assert len(read_lines(path)) == 2
    JsonLines(path, last_step=1).close()
    assert len(read_lines(path)) == 1


def test_reading_lines_forgives(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\n[1]\n{"a": 2}\n{"a"')
    assert (
        read_lines(tmp_path / "m.jsonl") == [{"a": 1}, {"a": 2}]
        and read_lines(tmp_path / "absent") == []
    )


def test_a_disk_that_refuses_lines(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="--run.dir") as caught:
        JsonLines(tmp_path / "file" / "m.jsonl")
    assert caught.value.code == 4
    metrics = JsonLines(tmp_path / "m.jsonl")
    metrics._file = Full()
    with pytest.raises(EnvironmentFault, match="No space left"):
        metrics.write({"step": 1})


class Full:
    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- loggers ---------------------------------------------------------------------------------------


class Fake:
    """A logger that works, or fails at one of its three calls."""

    def __init__(self, fails: str = "", kind: type[BaseException] = RuntimeError):
        self.fails = fails
        self.kind = kind
        self.seen = []

    def __call__(self, run_dir: Path, settings: dict) -> Fake:
        self.act("open")
        return self

    def act(self, what: str) -> None:
        self.seen.append(what)
        if what == self.fails:
            raise self.kind("network\ndown")

    def log(self, step: int, figures: dict) -> None:
        self.last = (step, figures)
        self.act("log")

    def close(self) -> None:
        self.act("close")


@pytest.mark.parametrize(
    "kind", [RuntimeError, OSError, ValueError, ImportError, KeyError, TimeoutError, AssertionError]
)
@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_failing_logger_is_dropped_and_the_others_go_on(monkeypatch, tmp_path, fails, kind):
    bad = Fake(fails, kind)
    good = Fake()
    said = []
    monkeypatch.setitem(KINDS, "wandb", bad)
    monkeypatch.setitem(KINDS, "trackio", good)
    loggers = Loggers(["wandb", "trackio"], tmp_path, {}, said.append)
    for step in range(3):
        loggers.log(step, {"step": step, "reward": 0.5, "text": "x", "flag": True})
    loggers.close()
    assert (
        len(said) == 1 and "wandb" in said[0] and "\n" not in said[0] and kind.__name__ in said[0]
    )
    assert bad.seen.count(fails) == 1 and good.seen == ["open", "log", "log", "log", "close"]
    assert good.last == (2, {"reward": 0.5, "flag": 1.0})


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_logger_cannot_hold_back_an_interrupt(monkeypatch, tmp_path, kind):
    monkeypatch.setitem(KINDS, "wandb", Fake("log", kind))
    with pytest.raises(kind):
        Loggers(["wandb"], tmp_path, {}, pytest.fail).log(1, {})


def test_a_logger_that_is_not_installed_is_named(monkeypatch, tmp_path):
    said = []
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "trackio", None)
    loggers = Loggers(["wandb", "trackio"], tmp_path, {}, said.append)
    assert (
        len(said) == 2
        and loggers.alive == {}
        and all("metrics.jsonl goes on" in line for line in said)
    )


def test_every_logger_of_the_configuration_has_a_maker():
    from vise_fast.config.schema import RunConfig

    assert all(RunConfig(loggers=(name,)) for name in KINDS) and set(KINDS) == {
        "tensorboard",
        "trackio",
        "wandb",
    }


def test_no_logger_means_no_work(tmp_path):
    loggers = Loggers([], tmp_path, {}, pytest.fail)
    loggers.log(1, {"a": 1})
    loggers.close()
