"""Runs beside each other: what is paired with what, which settings differ, and the page."""

import json
import re

import fake_run
import pytest

from vise_fast import compare as command
from vise_fast.evaluate.results import difference
from vise_fast.report import comparison, stored_run
from vise_fast.system import console

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same scenes, and one on others."""
    home = tmp_path_factory.mktemp("runs")
    fake_run.write(home / "a", steps=12)
    fake_run.write(home / "b", "collapsed", steps=12, seed=1, config_words=["--train.lr=1e-3"])
    fake_run.write(home / "c", steps=12, config_words=["--eval.seed=7"])
    return home


def compared(home, *names):
    return comparison.compare([stored_run.read(home / name) for name in names])


def test_figures_are_paired_by_image_where_the_images_are_the_same(runs):
    shown = compared(runs, "a", "b", "c")
    line = next(line for line in shown.lines if line.entry.title == "mean IoU, sampled")
    first, second, third = line.cells
    a, b = (stored_run.read(runs / name) for name in "ab")
    assert second.lead == difference(a.after, b.after, "sampled_iou")
    assert second.gain == difference(b.before, b.after, "sampled_iou")
    assert first.lead.value != first.lead.value  # nothing to lead over
    assert third.lead.value != third.lead.value and third.gain.value == third.gain.value
    assert shown.paired and not compared(runs, "a", "c").paired


def test_settings_that_differ_are_listed_and_places_are_not(runs):
    assert compared(runs, "a", "b").differences == {"train.lr": ["0.0007", "0.001"]}
    assert compared(runs, "a", "c").differences == {"eval.seed": ["90001", "7"]}
    assert compared(runs, "a", "a").differences == {}


def test_names_tell_runs_apart(tmp_path):
    for place in ("one/run", "two/run", "third"):
        fake_run.write(tmp_path / place, steps=1)
    assert compared(tmp_path, "one/run", "third").names == ["run", "third"]
    assert compared(tmp_path, "one/run", "two/run").names == ["one/run", "two/run"]


def test_the_command_prints_the_table_and_writes_a_page_that_stands_alone(runs, tmp_path, capsys):
    evil = tmp_path / EVIL.replace("/", "_")
    evil.mkdir()
    fake_run.write(evil / "run", steps=3, config_words=["--adapter.base=x"])
    words = [str(runs / "a"), str(runs / "b"), str(evil / "run"), "--out", str(tmp_path / "c.html")]
    assert console.run(command.main, words) == 0
    said = capsys.readouterr().out
    assert re.search(r"mean IoU, sampled +0\.\d{3} +0\.\d{3} \(−?-?0\.\d{3}, ", said)
    assert "differs  train.lr: 0.0007 · 0.001 · 0.0007" in said
    page = (tmp_path / "c.html").read_text()
    assert page.count('role="img"') == len(command._curves(compared(runs, "a", "b"), pytest.fail))
    assert "<script" not in page and "src=" not in page and "href=" not in page
    assert "lead −0." in page and "var(--c2)" in page


def test_a_run_that_is_not_finished_stays_in_the_page(runs, tmp_path, capsys):
    half = fake_run.write(tmp_path / "half", steps=12)
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(lines[:5]))
    content = json.loads((half / "evaluation.json").read_text())
    (half / "evaluation.json").write_text(json.dumps({"before": content["before"]}))
    out = str(tmp_path / "c.html")
    assert console.run(command.main, [str(runs / "a"), str(half), "--out", out]) == 0
    assert "5 of 12 updates, not finished" in (tmp_path / "c.html").read_text()
    said = capsys.readouterr().err
    assert "half has no figures" in said and "same images" not in said


@pytest.mark.parametrize("words, code", [([], 2), (["only"], 2), (["no", "where"], 3)])
def test_fewer_than_two_runs_and_none_are_refused(words, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert console.run(command.main, words) == code
    assert not list(tmp_path.iterdir())


def test_a_run_named_twice_is_refused(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert console.run(command.main, [str(runs / "a"), str(runs / "b" / ".." / "a")]) == 2
    assert "named twice" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_as_many_runs_as_a_sweep_makes_are_compared(tmp_path, capsys):
    runs = [fake_run.write(tmp_path / str(seed), steps=2, seed=seed) for seed in range(7)]
    words = [*map(str, runs), "--out", str(tmp_path / "page.html")]
    assert console.run(command.main, words) == 0, capsys.readouterr().err
