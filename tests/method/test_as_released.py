"""The released code's arithmetic: every fact of METHOD.md section 7."""

import numpy as np
import pytest
import torch

from vise_fast.config.schema import GhostConfig, ViewConfig, load
from vise_fast.images import geometry
from vise_fast.images.views import draw_view, ghost_lengths
from vise_fast.method import as_released

H, W = 480, 640


def value(a, b):
    return ((as_released.giou(a, b) + 1) / 2).item()


@pytest.mark.parametrize("box", [(0, 0, 10, 10), (100, 200, 400, 700), (0, 0, 1000, 1000)])
def test_identical_boxes_score_half(box):
    assert value(box, box) == 0.5


def test_two_boxes_side_by_side_at_half_overlap_score_the_maximum():
    a, b = (0, 0, 3, 1), (1, 0, 4, 1)
    assert geometry.iou(a, b).item() == pytest.approx(0.5)
    assert value(a, b) == pytest.approx(0.625)


def test_the_maximum_is_global():
    corners = np.random.default_rng(0).uniform(0, 1000, (200_000, 2, 4))
    a, b = (geometry.clean_1000(corners[:, i]) for i in (0, 1))
    assert ((as_released.giou(a, b) + 1) / 2).max().item() <= 0.625 + 1e-12
    shift = torch.linspace(0, 300, 3001, dtype=torch.float64)  # and it is reached along a slide
    slide = torch.tensor([0.0, 0, 300, 100], dtype=torch.float64) + shift[:, None] * torch.tensor(
        [1.0, 0, 1, 0]
    )
    scores = (as_released.giou((0, 0, 300, 100), slide) + 1) / 2
    assert scores.max().item() == pytest.approx(0.625, abs=1e-6) and shift[
        scores.argmax()
    ].item() == pytest.approx(100, abs=0.1)


def test_a_flip_lands_elsewhere():
    flip = geometry.flip_px(W)
    assert as_released.project((100.0, 200, 400, 700), flip).tolist() == [240, 200, 540, 700]
    right = geometry.project_1000((100.0, 200, 400, 700), flip, H, W)
    assert as_released.r_geo((100.0, 200, 400, 700), right, flip).item() == pytest.approx(
        0.455, abs=0.0006
    )


def random_cases(count=20_000):
    rng = np.random.default_rng(0)
    sizes = rng.uniform(100, 700, (count, 2))
    corners = rng.uniform(0, 1, (count, 2)) * (1000 - sizes)
    matrices = torch.stack(
        [draw_view(rng, H, W, ViewConfig(literal_pixels=True)).matrix_px for _ in range(count)]
    )
    return torch.as_tensor(np.concatenate([corners, corners + sizes], 1)), matrices


def test_a_perfect_grounder_scores_like_a_constant_full_image():
    boxes, matrices = random_cases()
    perfect = geometry.project_1000(boxes, matrices, H, W, "corners")
    full = torch.tensor([0.0, 0, 1000, 1000], dtype=torch.float64).expand_as(boxes)
    assert as_released.r_geo(boxes, perfect, matrices).mean().item() == pytest.approx(
        0.546, abs=0.005
    )
    assert as_released.r_geo(full, full, matrices).mean().item() == pytest.approx(0.542, abs=0.005)


def test_empty_hulls_score_nothing():
    assert value((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_the_ghost_is_cut_at_one_sigma():
    released = ghost_lengths(H, W, GhostConfig(radius_sigmas=1))
    assert (released.sigma, 2 * released.radius + 1) == (25, 51)
    assert 2 * ghost_lengths(H, W, GhostConfig()).radius + 1 == 151
    assert as_released.blur_spread_px() == pytest.approx(13.7, abs=0.05)
    assert as_released.blur_spread_px(radius=75) == pytest.approx(24.7, abs=0.1)


def test_the_log_prob_span_begins_inside_the_image():
    """Prompt of 12 tokens, one of them an image placeholder that became 300: everything from
    position 12 is averaged.
    """
    before, image, after, completion = 4, 300, 7, 22
    length = before + image + after + completion
    logprob = torch.cat(
        [torch.full((before + image + after,), -9.0), torch.full((completion,), -1.0)]
    )
    span = as_released.scored_span(before + 1 + after, length)
    assert (span.start, span.stop) == (12, 333)
    mean = as_released.mean_logprob(logprob, before + 1 + after).item()
    assert mean == pytest.approx((-9 * (length - 12 - completion) - completion) / (length - 12))
    assert logprob[-completion:].mean() == -1  # the span that was sampled


def test_the_preset_uses_them():
    config = load(None, ["--reward.preset=as_released"])
    assert (config.ghost.radius_sigmas, config.update.kl, config.view.literal_pixels) == (
        1.0,
        "k1_loss",
        True,
    )
    assert (config.reward.sem, config.reward.projection, config.reward.soft) == (
        "paper",
        "corners",
        False,
    )
