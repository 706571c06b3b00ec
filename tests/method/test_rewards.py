"""Rewards: each rule on hand-made evidence, and the simulated landscape of tight and full boxes."""

import dataclasses

import numpy as np
import pytest
import torch

from vise_fast.config.schema import RewardConfig, ViewConfig
from vise_fast.images import geometry as geo
from vise_fast.images import views
from vise_fast.method import rewards
from vise_fast.method.rewards import Evidence, score
from vise_fast.system.errors import ConfigError, NumericFault

H = 480
W = 640
BOX = (100.0, 200.0, 400.0, 700.0)
FLIPPED = (600.0, 200.0, 900.0, 700.0)


def settings(**stated):
    """Equal weights and no area term, whatever the defaults are: for these the numbers hold."""
    return RewardConfig(**({"w_geo": 0.5, "w_sem": 0.5, "w_area": 0.0} | stated))


HARD = {"sem": "paper", "soft": False, "sufficiency": False, "gate": 0.0, "projection": "corners"}
PAPER = settings(preset="paper", **HARD)
ROBUST = settings()


def rng():
    return np.random.default_rng(0)


def evidence(rows=4, group=4, views=1, controls=1, **changes):
    """Perfect rows: BOX on the image, its flip on every view; the judge sees the object, not its
    ghost, and the control leaves it.
    """
    every = torch.ones(rows, dtype=torch.bool)
    fields = {
        "box_1000": torch.tensor(BOX).double().repeat(rows, 1),
        "readable": every.clone(),
        "view_box_1000": torch.tensor(FLIPPED).double().repeat(rows, views, 1),
        "view_readable": every[:, None].repeat(1, views),
        "view_usable": every[:, None].repeat(1, views),
        "matrix_px": geo.flip_px(W).repeat(rows, views, 1, 1),
        "height": torch.full((rows,), H),
        "width": torch.full((rows,), W),
        "seen": torch.ones(rows),
        "gone": torch.zeros(rows),
        "query_readable": every.clone(),
        "group_size": group,
        "control": torch.ones(rows, controls),
        "keep": torch.ones(rows),
    }
    return Evidence(**fields | changes)


def rows_of(values, **kinds):
    return torch.tensor(values, **kinds)


def close(actual, expected):
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0
    )


# ---- the paper's reward --------------------------------------------------------------------------


def test_paper_reward_is_half_geometry_half_verdict():
    scores = score(evidence(gone=rows_of([0.0, 0.49, 0.51, 1.0])), PAPER, rng())
    close(scores.geometric, [1, 1, 1, 1])
    close(scores.semantic, [1, 1, 0, 0])
    close(scores.reward, [1, 1, 0.5, 0.5])
    assert scores.carries.all()


def test_paper_verdict_needs_the_object_to_be_seen_first():
    close(score(evidence(seen=rows_of([0.4, 0.5, 1.0, 0.0])), PAPER, rng()).semantic, [0, 1, 1, 0])
    tie = evidence(gone=torch.full((4,), 0.5))  # counts as visible
    close(score(tie, PAPER, rng()).semantic, [0, 0, 0, 0])


def test_geometric_reward_is_the_shifted_giou_of_the_projection():
    answers = torch.tensor(
        [FLIPPED, (600, 200, 900, 450), (0, 200, 300, 700), (0, 0, 1000, 1000)]
    ).double()[:, None]
    expected = (geo.giou(torch.tensor(FLIPPED).double(), answers[:, 0]) + 1) / 2
    close(score(evidence(view_box_1000=answers), PAPER, rng()).geometric, expected)


def test_views_are_averaged_and_dropped_ones_are_not():
    answers = torch.tensor([[FLIPPED, BOX]]).double().repeat(4, 1, 1)
    wrong = ((geo.giou(torch.tensor(FLIPPED), torch.tensor(BOX)) + 1) / 2).item()
    both = evidence(views=2, view_box_1000=answers)
    close(score(both, PAPER, rng()).geometric, [(1 + wrong) / 2] * 4)
    first = dataclasses.replace(both, view_usable=torch.tensor([[True, False]]).repeat(4, 1))
    scores = score(first, PAPER, rng())
    close(scores.geometric, [1] * 4)
    assert scores.metrics["views_dropped"] == 0.5


@pytest.mark.parametrize("size", [(31, 97), (480, 640), (641, 333)])
def test_every_row_uses_its_own_image_size(size):
    h, w = size
    heights = [h, 480, h, 480]
    widths = [w, 640, w, 640]
    sides = zip(widths, heights, strict=True)
    matrices = torch.stack([geo.affine_px(10, 0.9, 3, -2, *side) for side in sides])[:, None]
    height = torch.tensor(heights)
    width = torch.tensor(widths)
    boxes = torch.tensor(BOX).repeat(4, 1)[:, None]
    truth = geo.project_1000(boxes, matrices, height[:, None], width[:, None], "ellipse")
    made = evidence(height=height, width=width, matrix_px=matrices, view_box_1000=truth)
    close(score(made, ROBUST, rng()).geometric, [1] * 4)


# ---- answers that are no boxes -------------------------------------------------------------------


def test_an_unread_view_counts_zero_for_that_view():
    answers = torch.tensor([[FLIPPED, FLIPPED]]).double().repeat(4, 1, 1)
    answers[2, 1] = 0  # "not found" on the view
    readable = torch.tensor([[True, True], [True, False], [True, True], [False, False]])
    scores = score(evidence(views=2, view_box_1000=answers, view_readable=readable), PAPER, rng())
    close(scores.geometric, [1, 0.5, 0.5, 0])
    assert scores.carries.all() and scores.metrics["view_parse_rate"] == 5 / 8


@pytest.mark.parametrize(
    "config, expected",
    [
        (PAPER, 0.0),
        (PAPER.model_copy(update={"w_area": 0.5}), -1.5),
        (ROBUST, -1.0),
        (ROBUST.model_copy(update={"w_area": 1.25}), -2.25),
    ],
)
def test_unreadable_answers_get_the_lowest_reward_with_gradient(config, expected):
    boxes = torch.tensor([BOX, BOX, (0, 0, 1000, 1000), (0, 0, 0, 0)]).double()
    worst = evidence(
        box_1000=boxes,
        readable=rows_of([False, True, True, True]),
        gone=torch.tensor([float("nan"), 1, 1, 1]),
        view_readable=rows_of([[False]] * 4),
    )
    scores = score(worst, config, rng())
    assert scores.reward[0] == expected == rewards.lowest(config)
    assert scores.carries.all() and scores.metrics["parse_rate"] == 0.75
    assert (scores.reward[1:] >= scores.reward[0]).all()
    if config is not PAPER:
        assert (scores.reward[1:] > scores.reward[0]).all()


@pytest.mark.parametrize("name", ["vise", "oracle"])
def test_unreadable_answers_stay_just_below_their_group_where_that_is_asked_for(name):
    """Below every readable one it is compared with, and no louder than that; groups by themselves;
    without a readable one of the group as ever.
    """
    far = settings(name=name, w_area=0.0 if name == "oracle" else 0.7)
    near = far.model_copy(update={"unreadable": "group"})
    boxes = torch.tensor([BOX, BOX, (0, 0, 1000, 1000), (5, 5, 9, 9)] * 3).double()
    readable = rows_of([True, False, True, True] + [False] * 4 + [True, True, True, False])
    made = evidence(
        box_1000=boxes, readable=readable, truth_1000=torch.tensor([BOX] * 12).double(), rows=12
    )
    ours, before = score(made, near, rng()), score(made, far, rng())
    close(ours.reward[readable], before.reward[readable])
    assert ours.carries.tolist() == before.carries.tolist()
    for first, bad in ((0, 1), (8, 11)):
        group = [row for row in range(first, first + 4) if readable[row]]
        assert float(ours.reward[bad]) == pytest.approx(float(ours.reward[group].min()) - 0.1)
    close(ours.reward[4:8], [rewards.lowest(far)] * 4)


def test_not_found_scores_zero_and_never_beats_a_placed_box():
    boxes = torch.tensor([(0, 0, 0, 0), BOX, (0, 0, 1000, 1000), (300, 10, 300, 900)]).double()
    unread = torch.zeros(4, 1, dtype=torch.bool)
    nothing = evidence(box_1000=boxes, gone=torch.ones(4), view_readable=unread)
    scores = score(nothing, ROBUST, rng())
    close(scores.reward, [0, 0, 0, 0])
    scores = score(nothing, ROBUST.model_copy(update={"w_area": 1.25}), rng())
    close(scores.reward, [-1.25, -1.25 * 0.15**0.5, -1.25, -1.25])
    assert scores.metrics["zero_area"] == 0.5
    perfect = score(evidence(box_1000=boxes), PAPER, rng())
    close(perfect.reward[[0, 3]], [0, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_boxes_are_boxes_without_area(bad):
    boxes = torch.tensor(BOX).double().repeat(4, 1)
    boxes[1, 2] = bad
    scores = score(evidence(box_1000=boxes), PAPER, rng())
    close(scores.reward, [1, 0, 1, 1])


def test_swapped_corners_are_sorted_first():
    boxes = torch.tensor([(400, 700, 100, 200)]).double().repeat(4, 1)
    answers = torch.tensor([(900, 200, 600, 700)]).double().repeat(4, 1)[:, None]
    close(score(evidence(box_1000=boxes, view_box_1000=answers), PAPER, rng()).reward, [1] * 4)


# ---- rows and groups that teach nothing ----------------------------------------------------------


def test_a_box_without_views_gets_its_groups_mean():
    answers = torch.tensor([FLIPPED, BOX, FLIPPED, FLIPPED]).double()[:, None]
    wrong = ((geo.giou(torch.tensor(FLIPPED), torch.tensor(BOX)) + 1) / 2).item()
    usable = rows_of([[True], [True], [False], [True]])
    boxes = torch.tensor([BOX, BOX, BOX, (0, 0, 0, 0)]).double()  # the last one is no measurement
    scores = score(
        evidence(box_1000=boxes, view_box_1000=answers, view_usable=usable), PAPER, rng()
    )
    close(scores.geometric, [1, wrong, (1 + wrong) / 2, 0])
    assert scores.carries.all() and scores.metrics["unmeasured"] == 0


def test_a_group_without_views_carries_nothing_unless_geometry_has_no_weight():
    usable = torch.tensor([False, False, True, True])[:, None]
    made = evidence(group=2, view_usable=usable)
    scores = score(made, ROBUST, rng())
    assert scores.carries.tolist() == [False, False, True, True]
    close(scores.reward, [0, 0, 1, 1])
    assert scores.metrics["unmeasured"] == 0.5 and scores.metrics["geometric"] == 1
    assert score(made, ROBUST.model_copy(update={"w_geo": 0.0}), rng()).carries.all()


def test_unreadable_rows_carry_even_where_no_view_is_usable():
    made = evidence(
        view_usable=torch.zeros(4, 1, dtype=torch.bool), readable=rows_of([False, True, True, True])
    )
    assert score(made, ROBUST, rng()).carries.tolist() == [True, False, False, False]
    boxes = torch.tensor(
        [BOX, (0, 0, 0, 0), BOX, BOX]
    ).double()  # a box without area needs no view to score 0
    scores = score(dataclasses.replace(made, box_1000=boxes), ROBUST, rng())
    assert (
        scores.carries.tolist() == [True, True, False, False] and scores.metrics["geometric"] == 0
    )


def test_the_gate_closes_groups_whose_object_is_not_seen():
    made = evidence(
        rows=6,
        group=2,
        seen=rows_of([0.49, 0.49, 0.5, 0.5, 0.9, 0.9]),
        readable=rows_of([False, True] * 3),
    )
    scores = score(made, ROBUST, rng())
    assert scores.carries.tolist() == [False, False, True, True, True, True]
    assert scores.reward[:2].tolist() == [0, 0] and scores.metrics["gated"] == pytest.approx(1 / 3)
    assert score(made, ROBUST.model_copy(update={"gate": 0.0}), rng()).carries.all()


def test_the_gate_asks_only_rows_that_were_judged():
    made = evidence(
        seen=torch.tensor([float("nan"), 0.8, 0.8, 0.8]),
        readable=rows_of([False, True, True, True]),
    )
    scores = score(made, ROBUST.model_copy(update={"gate": 0.7}), rng())
    assert scores.carries.all() and scores.metrics["seen"] == pytest.approx(0.8)


def test_a_group_without_a_query_carries_nothing():
    nothing = torch.tensor([float("nan"), float("nan"), 1, 1])
    made = evidence(
        group=2, query_readable=rows_of([False, False, True, True]), seen=nothing, gone=nothing - 1
    )
    for config in (PAPER, ROBUST):
        scores = score(made, config, rng())
        assert scores.carries.tolist() == [False, False, True, True]
        assert scores.reward.isfinite().all()
        assert (
            scores.metrics["query_parse_rate"] == 0.5
            and scores.metrics["gated"] == 0
            and scores.metrics["parse_rate"] == 1
        )


# ---- the robust semantic term --------------------------------------------------------------------


def test_contrast_is_necessity_minus_control():
    made = evidence(
        seen=torch.full((4,), 0.9),
        gone=rows_of([0.1, 0.2, 0.9, 0.0]),
        control=rows_of([[0.8], [0.1], [0.1], [0.0]]),
    )
    config = ROBUST.model_copy(update={"sufficiency": False})
    close(score(made, config, rng()).semantic, [0.9 * (0.9 - 0.2), 0, 0, 0])


def test_controls_are_averaged_and_sufficiency_is_a_factor():
    made = evidence(
        controls=2,
        control=rows_of([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.5]]),
        keep=rows_of([1.0, 0.25, 1.0, 0.5]),
    )
    close(score(made, ROBUST, rng()).semantic, [0.5, 0.25, 0, 0.25])


def test_full_image_and_the_judge_that_denies_every_blur_get_nothing():
    full = torch.tensor([(0, 0, 1000, 1000)]).double().repeat(4, 1)
    close(
        score(evidence(box_1000=full, control=torch.zeros(4, 1)), ROBUST, rng()).semantic, [0] * 4
    )
    assert (
        score(evidence(box_1000=full, view_box_1000=full[:, None]), PAPER, rng()).reward == 1
    ).all()


def test_area_term():
    config = ROBUST.model_copy(update={"w_area": 0.4})
    boxes = torch.tensor([(0, 0, 500, 500), (0, 0, 1000, 1000), (0, 0, 100, 100), BOX]).double()
    flipped = geo.project_1000(boxes, geo.flip_px(W), H, W)[:, None]
    close(
        score(evidence(box_1000=boxes, view_box_1000=flipped), config, rng()).reward,
        [1 - 0.2, 1 - 0.4, 1 - 0.04, 1 - 0.4 * 0.15**0.5],
    )


@pytest.mark.parametrize("missing", ["control", "keep"])
def test_missing_evidence_is_named(missing):
    with pytest.raises(ValueError, match=missing):
        score(evidence(**{missing: None}), ROBUST, rng())
    assert score(evidence(**{missing: None}), PAPER, rng()).carries.all()


# ---- the other rewards ---------------------------------------------------------------------------


def test_oracle_is_the_true_iou():
    truth = torch.tensor([BOX, (100, 200, 400, 450), (500, 200, 800, 700), (0, 0, 0, 0)]).double()
    scores = score(
        evidence(truth_1000=truth, readable=rows_of([True, True, True, True])),
        settings(name="oracle"),
        rng(),
    )
    close(scores.reward, [1, 0.5, 0, 0])
    assert scores.carries.tolist() == [True, True, True, False]  # the last has no truth
    with pytest.raises(ValueError, match="truth_1000"):
        score(evidence(), settings(name="oracle"), rng())


def test_the_truth_is_for_the_oracle_and_for_rewards_of_ones_own(tmp_path):
    assert rewards.wants_truth(settings(name="oracle"))
    for name in ("vise", "random", "shuffled", "area_only"):
        assert not rewards.wants_truth(settings(name=name))
    assert rewards.wants_truth(settings(name="vise", plugin=str(tmp_path / "mine.py")))


def test_oracle_punishes_the_unreadable():
    truth = torch.tensor([BOX] * 4).double()
    scores = score(
        evidence(truth_1000=truth, readable=rows_of([True, False, True, True])),
        settings(name="oracle"),
        rng(),
    )
    close(scores.reward, [1, -1, 1, 1])


def test_random_ignores_everything_but_the_generator():
    config = settings(name="random")
    first = score(evidence(rows=400), config, rng()).reward
    assert torch.equal(
        first,
        score(
            evidence(rows=400, readable=torch.zeros(400, dtype=torch.bool)), config, rng()
        ).reward,
    )
    assert 0.45 < first.mean() < 0.55 and 0.08 < first.std() < 0.12
    assert not torch.equal(
        first, score(evidence(rows=400), config, np.random.default_rng(1)).reward
    )


def test_shuffled_keeps_the_distribution_and_loses_the_meaning():
    gone = torch.linspace(0, 1, 400)
    made = evidence(rows=400, gone=gone, seen=torch.cat([torch.zeros(40), torch.ones(360)]))
    straight, mixed = (score(made, settings(name=name), rng()) for name in ("vise", "shuffled"))
    assert torch.equal(straight.carries, mixed.carries) and mixed.carries.sum() == 360
    assert torch.equal(straight.reward[40:].sort().values, mixed.reward[40:].sort().values)
    assert abs(np.corrcoef(straight.reward[40:], mixed.reward[40:])[0, 1]) < 0.15


def test_area_only():
    boxes = torch.tensor([(0, 0, 500, 500), (0, 0, 1000, 1000), (0, 0, 0, 0), BOX]).double()
    config = settings(name="area_only", w_area=2.0)
    close(
        score(
            evidence(box_1000=boxes, readable=rows_of([True, True, True, False])), config, rng()
        ).reward,
        [-1, -2, -2, -3],
    )
    with pytest.raises(ConfigError, match="w_area"):
        score(evidence(), settings(name="area_only"), rng())


def test_geometric_only_and_semantic_only_are_weights():
    made = evidence(gone=torch.full((4,), 0.25))
    close(score(made, settings(w_geo=1, w_sem=0), rng()).reward, [1] * 4)
    close(score(made, settings(w_geo=0, w_sem=1), rng()).reward, [0.75] * 4)


def test_as_released_scores_with_the_released_arithmetic():
    """The right answer scores less than half."""
    released = settings(preset="as_released", **HARD)
    scores = score(evidence(), released, rng())
    assert scores.geometric[0].item() == pytest.approx(0.4545, abs=1e-3)


def test_rewards_of_the_views_own_answers():
    answers = torch.tensor([[FLIPPED, BOX]]).double().repeat(4, 1, 1)
    readable = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    usable = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    made = evidence(
        views=2,
        view_box_1000=answers,
        view_readable=readable,
        view_usable=usable,
        readable=rows_of([True, True, True, False]),
    )
    scores = score(made, ROBUST.model_copy(update={"w_area": 0.1}), rng())
    wrong = ((geo.giou(torch.tensor(FLIPPED), torch.tensor(BOX)) + 1) / 2).item()
    size = 0.1 * 0.15**0.5
    close(
        scores.view_reward[:3],
        [[0.5 - size, 0.5 * wrong - size], [0.5 - size, -1.1], [0.5 - size, 0.5 * wrong - size]],
    )
    assert scores.view_carries.tolist() == [
        [True, True],
        [True, True],
        [False, True],
        [False, False],
    ]
    assert not score(made, settings(name="random"), rng()).view_carries.any()
    closed = dataclasses.replace(made, seen=torch.zeros(4))
    assert not score(closed, ROBUST, rng()).view_carries.any()


# ---- figures -------------------------------------------------------------------------------------


def test_figures_that_are_always_logged():
    boxes = torch.tensor([(0, 0, 1000, 1000), (0, 0, 500, 500), BOX, (0, 0, 0, 0)]).double()
    made = evidence(
        box_1000=boxes,
        readable=rows_of([True, True, False, True]),
        seen=rows_of([0.9, 0.9, 0.9, 0.9]),
        gone=rows_of([0.1, 0.9, 0.1, 0.1]),
        control=rows_of([[0.1], [0.2], [0.9], [0.9]]),
    )
    m = score(made, ROBUST, rng()).metrics
    assert all(isinstance(value, float) and np.isfinite(value) for value in m.values())
    assert m["area"] == pytest.approx((1 + 0.25) / 2)
    assert m["area_large"] == 0.5
    assert m["zero_area"] == pytest.approx(1 / 3)
    assert m["parse_rate"] == 0.75
    assert (m["TU"], m["SB"], m["IG"], m["ID"]) == (0.5, 0.5, 0, 0)
    assert m["control"] == pytest.approx(0.15) and m["changed_elsewhere"] == 1


def test_verdicts_nobody_gave_enter_no_figure_and_no_reward():
    """No ghosts of groups behind the gate are judged; zeros, or anything, may stand there."""
    nothing = torch.tensor([float("nan"), 0.0, 0.2, 0.2])
    judged = rows_of([False, False, True, True])
    made = evidence(
        group=2,
        seen=rows_of([0.1, 0.1, 1.0, 1.0]),
        gone=nothing,
        control=nothing[:, None] + 0.6,
        keep=nothing + 0.5,
        judged=judged,
    )
    scores = score(made, ROBUST, rng())
    m = scores.metrics
    assert m["gone"] == pytest.approx(0.2)
    assert m["control"] == pytest.approx(0.8)
    assert m["keep"] == pytest.approx(0.7)
    assert (m["TU"], m["SB"], m["IG"], m["ID"], m["judged"], m["gated"]) == (1, 0, 0, 0, 0.5, 0.5)
    assert m["semantic"] == pytest.approx((0.8 - 0.2) * 0.7) == scores.semantic[2].item()
    nobody = torch.zeros(4, dtype=torch.bool)
    unasked = score(evidence(judged=nobody), settings(w_geo=1, w_sem=0), rng())
    assert unasked.metrics["TU"] == 0 and unasked.semantic.sum() == 0 and unasked.carries.all()


def test_verdict_table_adds_up():
    p = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    table = rewards.beaf(p[0], p[1], torch.ones(1000, dtype=torch.bool))
    half = torch.tensor([0.5])
    assert rewards.beaf(half, half, half > 0)["SB"] == 1  # a tie counts as visible
    assert sum(table.values()) == pytest.approx(1)
    assert table["IG"] == pytest.approx(float(((p[0] < 0.5) & (p[1] >= 0.5)).double().mean()))
    assert table["ID"] == pytest.approx(float(((p[0] < 0.5) & (p[1] < 0.5)).double().mean()))


def test_figures_of_a_batch_nobody_could_read():
    none = torch.zeros(4, dtype=torch.bool)
    nothing = torch.full((4,), float("nan"))
    for made in (
        evidence(readable=none, gone=nothing),
        evidence(query_readable=none, readable=none, seen=nothing, gone=nothing),
    ):
        scores = score(made, ROBUST, rng())
        assert all(np.isfinite(value) for value in scores.metrics.values())
        assert scores.metrics["parse_rate"] == 0


# ---- faults --------------------------------------------------------------------------------------


def test_rows_fill_groups_and_shapes_agree():
    with pytest.raises(ValueError, match="groups of 3"):
        evidence(group=3)
    with pytest.raises(ValueError, match="0 rows"):
        evidence(rows=0)
    with pytest.raises(ValueError, match="gone has 3 rows"):
        evidence(gone=torch.zeros(3))


@pytest.mark.parametrize("name", ["seen", "gone", "control", "keep"])
@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.1, float("inf")])
def test_broken_probabilities_stop_the_step(name, value):
    good = torch.ones(4, 1) if name == "control" else torch.ones(4)
    good[2] = value
    with pytest.raises(NumericFault, match=name):
        evidence(**{name: good})
    evidence(**{name: good}, readable=rows_of([True, True, False, True]))  # nothing was asked there


def test_unknown_rewards_are_named():
    with pytest.raises(ConfigError, match="did you mean 'oracle'"):
        score(evidence(), settings(name="oracel"), rng())
    with pytest.raises(ConfigError, match="known: .*random"):
        rewards.resolve(settings(name="zzz"))
    with pytest.raises(ConfigError, match="twice"):
        rewards.register("vise")(rewards.vise)


PLUGIN = """
import torch
from vise_fast.rewards import register

@register("{name}")
def tall(evidence, parts, config, rng):
    return {value}, evidence.readable
"""


def test_plugin_registers_a_reward(tmp_path):
    file = tmp_path / "tall.py"
    value = "(evidence.box_1000[:, 3] - evidence.box_1000[:, 1]) / 1000"
    file.write_text(PLUGIN.format(name="test_tall", value=value))
    config = settings(name="test_tall", plugin=str(file))
    scores = score(evidence(readable=rows_of([True, False, True, True])), config, rng())
    close(scores.reward, [0.5, 0, 0.5, 0.5])
    assert scores.carries.tolist() == [True, False, True, True]
    assert rewards.resolve(config) is rewards.resolve(config)  # loaded once


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("absent.py", None, "no such file"),
        ("broken.py", "def (", "could not be imported"),
        ("lost.py", "import no_such_module_anywhere", "no_such_module_anywhere"),
        ("reward.txt", "", "end in .py"),
        ("empty.py", "", "unknown reward 'test_absent'"),
    ],
)
def test_broken_plugins_are_user_errors(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        rewards.resolve(settings(name="test_absent", plugin=str(tmp_path / name)))


def test_a_plugin_that_returns_nan_stops_the_step(tmp_path):
    file = tmp_path / "nan.py"
    file.write_text(PLUGIN.format(name="test_nan", value="torch.full((4,), float('nan'))"))
    with pytest.raises(NumericFault, match="test_nan"):
        score(evidence(), settings(name="test_nan", plugin=str(file)), rng())


# ---- the landscape: which policy does each reward prefer? ----------------------------------------


def noisy(boxes, generator, sd=20.0):
    noise = torch.randn(boxes.shape, generator=generator, dtype=torch.float64)
    return geo.clean_1000(boxes + sd * noise)


def covered(objects, boxes):
    """Share of each object inside a box."""
    low = torch.maximum(objects[:, :2], boxes[:, :2])
    high = torch.minimum(objects[:, 2:], boxes[:, 2:])
    return (high - low).clamp_min(0).prod(1) / (objects[:, 2:] - objects[:, :2]).prod(1)


def judge(share_visible, generator):
    """An imperfect judge: sure of what it sees, unsure in between, wrong once in twenty."""
    p = torch.sigmoid(12 * (share_visible - 0.4))
    wrong = torch.rand(p.shape, generator=generator) < 0.05
    return torch.where(wrong, 1 - p, p)


def simulated(policy, rows=2000):
    """Evidence of a policy that answers with noisy tight boxes, or always with the full image, on
    round objects; one random view each.
    """
    generator = torch.Generator().manual_seed(0)
    draws = rng()
    sizes = 120 + 300 * torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    corner = torch.rand(rows, 2, generator=generator, dtype=torch.float64) * (1000 - sizes)
    objects = torch.cat([corner, corner + sizes], 1)
    drawn = [[views.draw_view(draws, H, W, ViewConfig())] for _ in range(rows)]
    matrices = views.stack(drawn)
    full = torch.tensor([0.0, 0, 1000, 1000], dtype=torch.float64).expand(rows, 4)
    moved = geo.project_1000(objects, matrices[:, 0], H, W, "ellipse")
    boxes = full if policy == "full" else noisy(objects, generator)
    answers = full if policy == "full" else noisy(moved, generator)
    placed = [views.control_box(draws, box)[0] for box in boxes]
    controls = torch.tensor(placed, dtype=torch.float64)
    unsided = torch.zeros(rows, dtype=torch.bool)
    return evidence(
        rows,
        group=1,
        box_1000=boxes,
        view_box_1000=answers[:, None],
        matrix_px=matrices,
        view_usable=views.usable(drawn, boxes, unsided, [H] * rows, [W] * rows, ViewConfig()),
        seen=judge(torch.ones(rows), generator),
        gone=judge(1 - covered(objects, boxes), generator),
        control=judge(1 - covered(objects, controls), generator)[:, None],
        keep=judge(covered(objects, boxes), generator),
    )


def preferred(config):
    """Mean reward of the rows that carry gradient: (tight, full)."""
    scores = [score(simulated(policy), config, rng()) for policy in ("tight", "full")]
    return tuple(s.reward[s.carries].mean().item() for s in scores)


def test_the_paper_reward_prefers_the_full_image():
    tight, full = preferred(PAPER)
    assert full > tight + 0.02, (tight, full)


@pytest.mark.parametrize("sufficiency", [False, True])
def test_the_contrast_reward_prefers_the_tight_box(sufficiency):
    tight, full = preferred(ROBUST.model_copy(update={"sufficiency": sufficiency, "gate": 0.0}))
    assert tight > full + 0.1, (tight, full)


# ---- words that must come back -------------------------------------------------------------------

BACK = torch.tensor([True, True, False, False])


def test_a_group_whose_words_do_not_come_back_is_closed():
    made = evidence(group=2, named_again=BACK)
    scores = score(made, settings(unique=True), rng())
    assert scores.carries.tolist() == scores.view_carries[:, 0].tolist() == BACK.tolist()
    assert scores.metrics["named_again"] == scores.metrics["gated"] == 0.5
    assert (scores.reward[2:] == 0).all() and (scores.reward[:2] > 0).all()


def test_words_close_no_group_unless_they_must_come_back():
    scores = score(evidence(group=2, named_again=BACK), ROBUST, rng())
    assert scores.carries.all() and scores.metrics["named_again"] == 0.5
    assert "named_again" not in score(evidence(), ROBUST, rng()).metrics


def test_of_groups_without_a_query_no_words_are_missed():
    asked = torch.tensor([True, True, False, False])
    made = evidence(
        group=2, named_again=torch.tensor([True, True, False, False]), query_readable=asked
    )
    assert score(made, settings(unique=True), rng()).metrics["named_again"] == 1


def test_words_that_must_come_back_were_asked_for():
    with pytest.raises(ValueError, match="named_again"):
        score(evidence(), settings(unique=True), rng())
