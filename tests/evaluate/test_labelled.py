"""A few labels to check with: the figures of drawn scenes, on pictures that somebody labelled."""

import json

import labelled
import numpy as np
import pytest
import torch

from vise_fast import train
from vise_fast.config import schema as config
from vise_fast.engine.fast import FastEngine
from vise_fast.evaluate import __main__ as command
from vise_fast.evaluate import held_out as evaluate
from vise_fast.evaluate.grounding import SCALES, cross_fitted
from vise_fast.evaluate.results import Results, paired_gain
from vise_fast.evaluate.table import by_class
from vise_fast.evaluate.titles import classes, entry
from vise_fast.images.drawn import Scenes
from vise_fast.images.sources import open_source
from vise_fast.method import roles
from vise_fast.model import load as model
from vise_fast.system import console

COUNT = 5
SHORT = ["--rollout.box_tokens=20", "--rollout.query_tokens=8", "--eval.samples=2"]


def settings(*words):
    return config.load(None, [*SHORT, "--eval.scenes=5", "--eval.batch=3", *map(str, words)])


@pytest.fixture(scope="module")
def shipped():
    """The shipped model with a small non-zero adapter."""
    policy = model.load(settings())
    torch.manual_seed(0)
    for name, parameter in policy.parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    policy.backbone.refresh()
    return FastEngine(policy.backbone, policy.tokens)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The held-out scenes of the drawn source on disk, with labels."""
    folder = tmp_path_factory.mktemp("labelled")
    source = Scenes(settings())
    drawn = [source.scene(image.key) for image in source.held_out(COUNT)]
    paths = labelled.save(folder / "checked", drawn)
    labelled.as_coco(folder / "checked", paths, drawn)
    labelled.as_points(folder / "checked", paths, drawn)
    labelled.save(folder / "photos", labelled.drawn(8, seed=2))
    (folder / "absent.txt").write_text("white cross\npurple cross\n")
    return folder


def opened(place, name, *words):
    labels = f"--eval.labels={place / 'checked' / name}"
    made = settings(labels, "--run.dir", place / "run", *words)
    return made, open_source(made, model.grid_multiple("nano"))


@pytest.fixture(scope="module")
def arms(shipped, place):
    """Base and adapter on labelled pictures alone."""
    made, source = opened(place, "labels.json")
    return evaluate.compare(shipped, source, made)


SAME = ("iou", "iou_50", "centre_inside", "centre_error", "parse_rate", "area", "area_ratio")


def test_labelled_pictures_get_the_figures_of_the_same_scenes(shipped, arms):
    made = settings()
    drawn = evaluate.compare(shipped, Scenes(made), made)
    for scenes, pictures in zip(drawn, arms, strict=True):
        assert scenes.n == pictures.n == COUNT
        for name in [f"greedy_{figure}" for figure in SAME]:
            assert pictures.values[name] == pytest.approx(scenes.values[name], abs=1e-5), name
        for name in ("visible_present", "visible_hidden", "TU", "blind_iou", "own_parse_rate"):
            assert pictures.values[name] == pytest.approx(scenes.values[name], abs=1e-5), name
        assert scenes.marks["sampled_iou"][1].sum() == pictures.marks["sampled_iou"][1].sum()
        lacks = set(scenes.values) - set(pictures.values)
        assert lacks == {
            "query_present",  # not all that is there is labelled
            "visible_absent",
            *(name for name in scenes.values if name.startswith("pope_")),
        }


def test_each_half_is_rescaled_by_the_other():
    rng = np.random.default_rng(0)
    tops = rng.uniform(0, 0.1, (len(SCALES), 9))
    small, large = (int(np.abs(np.array(SCALES) - scale).argmin()) for scale in (0.8, 1.2))
    tops[small, 0::2] += 1.0  # what suits one half best …
    tops[large, 1::2] += 2.0
    bottom = np.ones(9)
    marks = {f"greedy_iou@{n}": (row, bottom) for n, row in enumerate(tops)}
    marks["greedy_iou"] = (tops[0], bottom)
    found, best = cross_fitted(marks)
    top, of = found["greedy_iou_rescaled"]
    assert set(found) == {"greedy_iou", "greedy_iou_rescaled"} and of is bottom
    assert np.array_equal(top[0::2], tops[large, 0::2])  # … is what the other gets
    assert np.array_equal(top[1::2], tops[small, 1::2])
    assert best == {"greedy_scale": pytest.approx(1.2)}
    assert cross_fitted({"own_area": (top, of)}) == ({"own_area": (top, of)}, {})
    empty = {f"sampled_iou@{n}": (np.zeros(3), np.zeros(3)) for n in range(len(SCALES))}
    assert cross_fitted(empty)[1] == {"sampled_scale": 1.0}


def test_classes_add_up_to_the_whole(arms):
    for results in arms:
        for kind in ("greedy", "sampled"):
            for figure in ("iou", "iou_50", "centre_inside", "area_ratio"):
                name = f"{kind}_{figure}"
                parts = [m for key, m in results.marks.items() if key.startswith(f"{name}:")]
                tops = np.sum([top for top, _ in parts], 0)
                bottoms = np.sum([bottom for _, bottom in parts], 0)
                assert tops == pytest.approx(results.marks[name][0])
                assert bottoms == pytest.approx(results.marks[name][1])
        counts = classes(results.marks)
        assert sum(counts.values()) == results.marks["greedy_iou"][1].sum()
    gain = paired_gain(*arms, f"greedy_iou:{next(iter(counts))}")
    assert np.isfinite(gain.value)
    rows = by_class({"before": arms[0].json(), "after": arms[1].json()})
    assert [row[:2] for row in rows] == [[name, str(n)] for name, n in counts.items()]
    assert entry("greedy_iou:dog").title == "dog: mean IoU, greedy" and entry("nothing:dog") is None


def test_neither_the_batch_nor_the_other_arm_changes_a_figure(shipped, place, arms):
    made, source = opened(place, "labels.json", "--eval.batch=5")
    alone = evaluate.held_out(shipped, source, made, True)
    assert alone.values.keys() == arms[1].values.keys()
    for name, value in alone.values.items():
        assert value == pytest.approx(arms[1].values[name], abs=1e-4), name


def test_photographs_are_looked_at_beside_them(shipped, place):
    words = ["--data.dir", place / "photos", "--data.holdout=0.4", "--eval.absent"]
    made, source = opened(place, "labels.json", *words, place / "absent.txt")
    held = len(source.held_out(5))
    results = evaluate.held_out(shipped, source, made, False)
    assert held > 0 and results.n == held + COUNT
    assert results.marks["own_parse_rate"][1].tolist() == [1] * results.n
    assert results.marks["greedy_iou"][1][:held].tolist() == [0] * held
    assert results.marks["visible_absent"][1][:held].tolist() == [1] * held
    asked = results.marks["visible_absent"][1][held:].sum()
    assert asked == results.marks["visible_present"][1].sum() and "pope_f1" in results.values


def test_points(shipped, place, monkeypatch):
    made, source = opened(place, "points.jsonl")
    results = evaluate.held_out(shipped, source, made, False)
    assert {"greedy_point_inside", "sampled_point_error"} <= set(results.values)
    assert "greedy_iou" not in results.values and "visible_present" not in results.values
    asked = sum(len(picture.points) for picture in source.labels.pictures)
    assert results.marks["greedy_point_inside"][1].sum() == asked
    assert all(entry(name) is not None for name in results.values)
    real = roles.ground

    def everything(*args):
        boxes = real(*args)
        boxes.box_1000[:] = torch.tensor([0.0, 0.0, 1000.0, 1000.0])
        return boxes

    monkeypatch.setattr(roles, "ground", everything)
    full = evaluate.held_out(shipped, source, made, False).values
    assert full["greedy_point_inside"] == 1 and full["greedy_point_area"] == 1


def test_at_most_so_many_and_always_the_same(place, shipped):
    made, source = opened(place, "labels.json", "--eval.scenes=2", "--eval.attention=false")
    results = evaluate.held_out(shipped, source, made, False)
    assert results.n == 2
    wanted = [len(picture.objects) for picture in source.labels.pictures[:2]]
    assert results.marks["greedy_iou"][1].tolist() == wanted


def test_from_the_run_to_the_report(place, tmp_path, capsys):
    run = tmp_path / "run"
    words = [
        *SHORT,
        "--train.steps=1",
        "--train.warmup=0",
        "--train.schedule=constant",
        "--train.batch=2",
        "--rollout.views=2",
    ]
    words += ["--data.dir", place / "photos", "--eval.scenes=2", "--run.dir", run]
    labels = ["--eval.labels", place / "checked" / "labels.json"]
    assert console.run(train.main, [str(word) for word in [*words, *labels]]) == 0
    shown = capsys.readouterr().out
    assert "labelled pictures to check with" in shown and "labelled pictures by class" in shown
    evaluation = json.loads((run / "evaluation.json").read_text())
    before = Results.of(evaluation, "before")
    after = Results.of(evaluation, "after")
    assert np.isfinite(paired_gain(before, after, "sampled_iou").value)
    name = next(iter(classes(before.marks)))
    page = (run / "report.html").read_text()
    assert f"{name}: mean IoU, greedy" in page and "By class" in page
    assert console.run(command.main, ["--adapter", str(run / "adapter"), "--scenes=1"]) == 0
    assert "by class, greedy" in capsys.readouterr().out
    again = ["--resume", "auto", "--run.dir", run, "--train.steps=2", "--eval.labels"]
    points = place / "checked" / "points.jsonl"
    assert console.run(train.main, [str(word) for word in [*again, points]]) == 3
    assert "the labels are not those of the run" in capsys.readouterr().err
