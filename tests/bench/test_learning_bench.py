"""The learning study's arithmetic on made-up cells; a cell of one update; the largest effects are
not asserted here but shown by --quick.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gradient_noise
import learning
import signals

from vise_fast.config.schema import load
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method import loss
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.model import load as model

ROOT = Path(__file__).parents[2]
ONE = learning.Length(1)
FIVE = learning.Length(5)


def cell(row, seed, iou, n=200, steps=5):
    rng = np.random.default_rng(7)  # the scenes are the same for every row
    noise = rng.normal(0, 0.1, n)
    top = (iou + noise).tolist()
    marks = {
        "greedy_iou": {"top": top, "bottom": [1.0] * n},
        "greedy_iou_rescaled": {"top": (np.array(top) + 0.01).tolist(), "bottom": [1.0] * n},
    }
    return {
        "row": row,
        "seed": seed,
        "steps": steps,
        "split": "validation",
        "marks": marks,
        "curve": [],
        "seconds": 1.0,
    }


@pytest.fixture
def cells(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "CELLS", tmp_path)
    made = [
        cell("base", 0, 0.40),
        *[cell("robust", s, 0.45 + 0.01 * s) for s in range(3)],
        *[cell("oracle", s, 0.50) for s in range(3)],
        cell("random", 0, 0.40),
    ]
    for one in made:
        learning.cell_path(one["row"], one["seed"], FIVE, "validation").write_text(json.dumps(one))
    learning.cell_path("robust", 0, learning.Length(9), "validation").write_text(
        json.dumps(cell("robust", 0, 0.9, steps=9))
    )
    return learning.load_cells(FIVE, "validation")


def test_gains_are_paired_and_shares_are_of_the_oracles(cells):
    table = learning.summarise(cells)
    robust = table["robust"]["greedy_iou"]
    assert robust["gain"] == pytest.approx(0.06)
    assert robust["seeds"] == 3 and robust["se"] == pytest.approx(0.01 / 3**0.5)
    assert robust["of_oracle"] == pytest.approx(0.6)
    assert 0.04 < robust["low"] < 0.06 < robust["high"] < 0.08, (
        "scenes are paired, so their spread of 0.1 is no part of the interval"
    )
    random = table["random"]["greedy_iou"]
    assert random["gain"] == pytest.approx(0) and random["se"] is None


def test_a_figure_kept_as_a_mean_has_the_spread_of_its_seeds_and_no_interval(cells):
    for row, values in (("base", [0.7]), ("robust", [0.71, 0.72, 0.76])):
        for one, value in zip(cells[row], values, strict=True):
            one["values"] = {"pope_accuracy": value}
    cells[learning.RESCALED] = [learning.rescaled(cells["base"][0])]
    table = learning.summarise(cells)
    found = table["robust"]["pope_accuracy"]
    assert found["mean"] == pytest.approx(0.73) and found["gain"] == pytest.approx(0.03)
    assert found["se"] == pytest.approx(0.0007**0.5 / 3**0.5)
    told = learning.show(table, cells).splitlines()
    assert "| robust | 3 | 0.730 ± 0.015 |" in told and "| base | 1 | 0.700 |" in told
    assert not any("rescaled | 1 | 0.7" in line for line in told)


def test_cells_of_other_lengths_stay_out(cells):
    assert [c["seed"] for c in cells["robust"]] == [0, 1, 2]


def test_cells_of_so_many_minutes_are_a_table_of_their_own(cells):
    ten = learning.Length(0, 10)
    timed = cell("robust", 1, 0.6, steps=5) | {"minutes": 10}
    learning.cell_path("robust", 1, ten, "validation").write_text(json.dumps(timed))
    assert list(learning.load_cells(ten, "validation")) == ["base", learning.RESCALED, "robust"]
    assert [c["seed"] for c in learning.load_cells(FIVE, "validation")["robust"]] == [0, 1, 2]


def test_as_many_updates_are_trained_as_fit_into_the_time(tmp_path, monkeypatch):
    """A tenth of a second each; examined on another split, the training is not timed again."""
    asked = []

    def timed(study, updates):
        asked.append(updates)
        return {"cpu_seconds": 0.1 * updates}

    monkeypatch.setattr(learning.Study, "of", lambda words: words)
    monkeypatch.setattr(learning, "train", timed)
    assert learning.affordable([], 2, tmp_path / "none.json") in (1199, 1200)
    assert asked == [1, learning.TIMED]
    about = tmp_path / "about.json"
    about.write_text(json.dumps({"config": {"train": {"steps": 77}}}))
    assert learning.affordable([], 2, about) == 77


def test_the_base_rescaled_is_a_row_of_its_own(cells):
    table = learning.summarise(cells)
    assert list(table)[:2] == ["base", learning.RESCALED]
    assert table[learning.RESCALED]["greedy_iou"]["gain"] == pytest.approx(0.01)
    panels = [panel.splitlines() for panel in learning.show(table, cells).split("\n\n")]
    assert any(line.startswith(f"| {learning.RESCALED}") for line in panels[0])
    for panel in panels:
        assert len({line.count("|") for line in panel}) == 1, (
            "every line has as many cells as the heading"
        )


def test_the_page_keeps_what_stands_around_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{learning.MARK}\nold\n{learning.MARK}\nbelow\n")
    learning.publish("new", page)
    assert page.read_text() == f"above\n{learning.MARK}\nnew\n{learning.MARK}\nbelow\n"
    assert (ROOT / "docs" / "LEARNING.md").read_text().count(learning.MARK) == 2


def test_one_cell_runs_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "CELLS", tmp_path)
    monkeypatch.setattr(learning, "ADAPTERS", tmp_path / "adapters")
    for split in learning.SCENES:
        monkeypatch.setitem(learning.SCENES, split, 4)
    words = ["--train.batch", "2", "--rollout.samples", "2"]
    result = learning.run_cell("oracle", 0, ONE, "validation", words)
    monkeypatch.setattr(learning, "train", None)
    again, elsewhere = (
        learning.run_cell("oracle", 0, ONE, split, words) for split in ("validation", "reported")
    )
    assert again == result
    assert elsewhere["curve"] == result["curve"], "examined again, not trained again"
    assert elsewhere["marks"] != result["marks"]
    assert result["row"] == "oracle" and len(result["curve"]) == 1
    assert {"greedy_iou", "sampled_iou"} <= set(result["marks"])
    learning.cell_path("oracle", 0, ONE, "validation").write_text(json.dumps(result))
    learning.spawn([("oracle", 0)], ONE, "validation", 1, words)
    assert "1 cells finished, 0 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings \(train\.batch 2, not 3\); move it away"):
        learning.spawn([("oracle", 0)], ONE, "validation", 1, [*words, "--train.batch", "3"])


def test_the_published_cells_are_what_their_rows_say_today():
    paths = sorted(learning.CELLS.glob(f"{learning.PUBLISHED}-*.json"))
    found = {path.stem: json.loads(path.read_text()) for path in paths}
    assert len(found) > 15
    assert {
        name: others for name, c in found.items() if (others := learning.differences(c, []))
    } == {}


def test_what_a_piece_knows_is_measured_within_its_group():
    group = torch.tensor([0, 0, 1, 1])
    truth = torch.tensor([0.1, 0.3, 0.9, 0.7], dtype=torch.float64)
    offset = truth + torch.tensor([0, 0, 100, 100], dtype=torch.float64)
    known = signals.deviation(truth, group)
    for values in (truth * 2, offset):  # what differs between groups says nothing
        found = signals.deviation(values, group)
        assert signals.correlation(found, known) == pytest.approx(1)
        assert signals.picked(values, truth, group) == pytest.approx(0.6)
    assert signals.picked(-truth, truth, group) == pytest.approx(0.4)


def test_signal_and_noise_of_gradients_that_are_known():
    """One direction shared by all images, the rest of each its own: the images that are needed and
    the angle to another direction come out as they were put in.
    """
    rng = np.random.default_rng(0)
    count, noise = 400, 3.0
    shared = np.zeros(1000)
    shared[0] = 1
    turned = np.zeros(1000)
    turned[:2] = 0.6, 0.8
    own, other = (
        torch.from_numpy(mean + rng.normal(0, noise / 1000**0.5, (count, 1000)))
        for mean in (shared, turned)
    )
    products = gradient_noise.Products.of(own, other)
    everyone = np.ones(count)
    assert gradient_noise.needed(products, everyone) == pytest.approx(noise**2, rel=0.1)
    assert gradient_noise.cosine(products, everyone) == pytest.approx(0.6, abs=0.05)
    alone = own - own.mean(0) * count / (count - 1)  # no direction is left, or less than none
    assert gradient_noise.needed(gradient_noise.Products.of(alone, other), everyone) == np.inf


def test_gradients_of_samples_add_up_to_that_of_the_update():
    words = ["--train.batch", "2", "--train.share_forward", "false", "--rollout.samples", "4"]
    config = load(None, words)
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    learner = Learner(policy, engine, config)
    (played,) = play_batch(engine, Scenes(config).batch(0, 2), config, 0)
    each = gradient_noise.sample_gradients(learner, played, 4)
    advantage = torch.linspace(-1, 1, 8)
    scores = learner.scorer.score(played, list(range(8)))
    named = [value for name, value in learner.parameters.items() if "lora_B" in name]
    means = loss.token_mean(scores.table(scores.logprob), scores.mask)
    whole = torch.autograd.grad((advantage * means).sum(), named)
    torch.testing.assert_close(
        advantage @ each, torch.cat([g.flatten() for g in whole]), rtol=1e-3, atol=1e-4
    )
