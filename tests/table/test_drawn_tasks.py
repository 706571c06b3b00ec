"""The shipped tasks: what is asked, what is true, how it is scored; and samples as a table."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from vise_fast.system import console
from vise_fast.system.errors import DataError
from vise_fast.table import __main__ as table
from vise_fast.table import drawn, drawn_scoring, paired, rows
from vise_fast.text.prompts import NATURAL, SHORT

COUNT = 5


class Loader(yaml.SafeLoader):
    """lmms-eval's `!function`, as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("drawn") / "tasks"
    drawn.write(place, SHORT, COUNT)
    return place


def questions(place, name):
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", drawn.TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("blind", ["", drawn.BLIND])
def test_a_task_is_one_that_lmms_eval_reads(place, task, blind):
    content = yaml.load((place / f"{task.name}{blind}.yaml").read_text(), Loader)
    asked = questions(place, task.name + blind)
    assert content["task"] == task.name + blind
    assert content["dataset_kwargs"]["data_files"]["test"].endswith(f"{task.name}{blind}.jsonl")
    assert [metric["metric"] for metric in content["metric_list"]] == list(task.figures)
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        module, _, function = content[key].partition(".")
        assert (place / f"{module}.py").is_file() and hasattr(drawn_scoring, function)
    assert {row["scene"] for row in asked} == set(range(COUNT))
    scores = getattr(drawn_scoring, content["process_results"].split(".")[1])(asked[0], [""])
    assert set(scores) == set(task.figures)


def test_the_truth_scores_one_and_nothing_scores_nothing(place):
    for row in questions(place, "drawn_boxes"):
        said = SHORT.write_box(row["box"])
        assert drawn_scoring.score_box(row, [said])["iou"] > 0.95
        assert drawn_scoring.score_box(row, ["no idea"]) == dict.fromkeys(
            ("iou", "iou_50", "readable"), 0.0
        )
    for row in questions(place, "drawn_yes_no"):
        said = SHORT.write_verdict(row["answer"] == "yes")
        assert drawn_scoring.score_yes_no(row, [said])["accuracy"] == 1
        assert drawn_scoring.score_yes_no(row, ["yes and no"])["accuracy"] == 0
    for row in questions(place, "drawn_captions"):
        said = SHORT.write_query(row["names"][0])
        assert drawn_scoring.score_caption(row, [said]) == {"names_present": 1.0, "words": 2.0}
        assert drawn_scoring.score_caption(row, [""])["names_present"] == 0


def test_every_question_knows_its_scene(place):
    for task in drawn.TASKS:
        wanted = [row["scene"] for row in questions(place, task.name)]
        assert drawn.scene_of(place, task.name) == wanted and wanted == sorted(wanted)


def test_half_of_the_yes_no_questions_are_yes(place):
    answers = [row["answer"] for row in questions(place, "drawn_yes_no")]
    assert answers == ["yes", "no"] * COUNT


def test_the_blind_see_grey(place):
    pictures = [drawn_scoring.doc_to_visual(r)[0] for r in questions(place, "drawn_boxes_blind")]
    assert all(picture.getcolors() == [(128 * 128, (128, 128, 128))] for picture in pictures)
    seen = drawn_scoring.doc_to_visual(questions(place, "drawn_boxes")[0])[0]
    assert isinstance(seen, Image.Image) and len(seen.getcolors(maxcolors=20_000)) > 10


def test_questions_are_in_the_models_own_style(tmp_path):
    drawn.write(tmp_path / "natural", NATURAL, 1)
    assert "<box>" in questions(tmp_path / "natural", "drawn_boxes")[0]["question"]


@pytest.mark.parametrize(
    ("one", "two", "overlap"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),
        ((5, 5, 5, 5), (0, 0, 10, 10), 0.0),
    ],
)
def test_overlap_by_hand(one, two, overlap):
    assert drawn_scoring.iou(one, two) == pytest.approx(overlap)


# ---- samples as a table --------------------------------------------------------------------------


def samples(scores, scenes=None, **more):
    return [
        {"doc_id": i, "doc_hash": f"q{i}", "filtered_resps": ["a b"], "f": score, **more}
        | ({} if scenes is None else {"scene": scenes[i]})
        for i, score in enumerate(scores)
    ]


ROW = rows.Row("title", "task", "f")
NONE = {"base": None, "adapter": None}


def test_a_difference_has_a_paired_interval():
    scores = np.random.default_rng(0).random(200)
    both = {"base": samples(scores), "adapter": samples(scores + 0.1)}
    title, base, adapter, gain, paper = paired.cells(ROW, both, NONE)
    assert (title, paper) == ("title", "")
    assert float(adapter) - float(base) == pytest.approx(0.1, abs=2e-3)
    assert gain == "+0.100 (95 % +0.100 to +0.100)", "the same everywhere: nothing is uncertain"


def test_scenes_are_what_is_resampled():
    scores = np.array([0, 1.0, 0, 1.0])
    found = paired.results(samples(scores, [0, 0, 1, 1]), scores, "f")
    assert found.n == 2 and found.values == {"f": 0.5}


def test_pope_like_scores_lie_inside():
    inside = [{"score": 1.0}, {"score": 0.0}]
    assert paired.score(samples(inside), "f").tolist() == [1, 0]
    assert paired.score(samples([{"pred": "x"}]), "f") is None


def test_a_figure_of_a_corpus_is_told_without_an_interval():
    both = {"base": samples([{"pred": "x"}]), "adapter": samples([{"pred": "y"}])}
    row = rows.Row("CIDEr", "task", "f", paper=(1.0, 2.0))
    assert paired.cells(row, both, {"base": 0.5, "adapter": 0.75}) == [
        *("CIDEr", "0.500", "0.750", "+0.250 (no interval)", "1.00 → 2.00")
    ]


def test_arms_that_were_asked_other_things_are_not_compared():
    one = samples([1.0, 2.0], input="find it")
    paired.check_paired({"base": one, "adapter": one}, "task")
    for other in (one[:1], samples([1.0, 2.0], input="find me")):
        with pytest.raises(DataError, match="same questions"):
            paired.check_paired({"base": one, "adapter": other}, "task")


def test_lengths_and_cuts():
    counted = samples([1, 1], token_counts=[{"output_tokens": 64}])
    assert (
        paired.words(counted) == 2 and paired.cut(counted, 64) == 1 and paired.cut(counted, 65) == 0
    )
    assert paired.cut(samples([1]), 64) is None


# ---- the command ---------------------------------------------------------------------------------


def run(*words):
    return console.run(table.main, [str(word) for word in words])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    import stored

    return stored.adapter(tmp_path_factory.mktemp("table") / "adapter")


def test_a_dry_run_says_what_would_run_and_what_is_missing(adapter, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--adapter", adapter, "--out", out, "--env", tmp_path / "new", "--dry-run"]
    code = run(*words)
    shown = capsys.readouterr()
    assert shown.out.count("to run") == 2 * 7 and "lmms_eval --model qwen3_vl" in shown.out
    assert "download" in shown.out and "time" in shown.out and "to make" in shown.out
    assert code == (4 if shown.err else 0)
    assert not out.exists() and not (tmp_path / "new").exists()


def test_nothing_starts_where_something_is_missing(adapter, tmp_path, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    words = ["--adapter", adapter, "--out", out, "--env", tmp_path / "theirs", "--tasks", "drawn"]
    assert run(*words) == 4
    assert "not begun by this command" in capsys.readouterr().err and not out.exists()
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "words",
    [["--out", "x"], ["--adapter", "{a}"], ["--adapter", "{a}", "--out", "x", "--tasks", "mine"]],
)
def test_words_that_cannot_be_meant_are_refused(words, adapter):
    assert run(*(word.format(a=adapter) for word in words)) == 2
