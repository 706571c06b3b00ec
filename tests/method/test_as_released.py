"""The released code's arithmetic: what is known of it, stated as facts."""

import numpy as np
import pytest
import torch

from vise_fast.config.schema import GhostConfig, ViewConfig, load
from vise_fast.images import geometry
from vise_fast.images.views import draw_view, ghost_lengths
from vise_fast.method import as_released

H = 480
W = 640


def value(a, b):
    return ((as_released.giou(a, b) + 1) / 2).item()


@pytest.mark.parametrize("box", [(0, 0, 10, 10), (100, 200, 400, 700), (0, 0, 1000, 1000)])
def test_identical_boxes_score_half(box):
    assert value(box, box) == 0.5


def test_the_scale_plays_no_part_and_an_empty_hull_is_minus_one():
    a = torch.tensor([0.0, 0, 3, 1], dtype=torch.float64)
    b = torch.tensor([2.0, 0.5, 5, 2], dtype=torch.float64)
    truth = as_released.giou(a, b).item()
    for scale in (1e-3, 1e3):
        assert as_released.giou(scale * a, scale * b).item() == pytest.approx(truth, rel=1e-4)
    assert as_released.giou((4, 4, 4, 4), (4, 4, 4, 4)).item() == -1


def test_two_boxes_side_by_side_at_half_overlap_score_the_maximum():
    a = (0, 0, 3, 1)
    b = (1, 0, 4, 1)
    assert geometry.iou(a, b).item() == pytest.approx(0.5)
    assert value(a, b) == pytest.approx(0.625)


def test_the_maximum_is_global():
    corners = np.random.default_rng(0).uniform(0, 1000, (200_000, 2, 4))
    a = geometry.clean_1000(corners[:, 0])
    b = geometry.clean_1000(corners[:, 1])
    assert ((as_released.giou(a, b) + 1) / 2).max().item() <= 0.625 + 1e-12
    # and it is reached along a slide
    shift = torch.linspace(0, 300, 3001, dtype=torch.float64)
    box = torch.tensor([0.0, 0, 300, 100], dtype=torch.float64)
    slide = box + shift[:, None] * torch.tensor([1.0, 0, 1, 0])
    scores = (as_released.giou(box, slide) + 1) / 2
    assert scores.max().item() == pytest.approx(0.625, abs=1e-6)
    assert shift[scores.argmax()].item() == pytest.approx(100, abs=0.1)


def test_a_flip_lands_elsewhere():
    flip = geometry.flip_px(W)
    assert as_released.project((100.0, 200, 400, 700), flip).tolist() == [240, 200, 540, 700]
    right = geometry.project_1000((100.0, 200, 400, 700), flip, H, W)
    found = as_released.r_geo((100.0, 200, 400, 700), right, flip).item()
    assert found == pytest.approx(0.455, abs=0.0006)


def test_a_shift_is_added_to_thousandths():
    """50 and 60 pixels become 50 and 60 thousandths, whatever the image's size."""
    shift = geometry.affine_px(0, 1, 50, 60, W, H)
    assert as_released.project((100.0, 200, 400, 700), shift).tolist() == [150, 260, 450, 760]
    assert as_released.project((100.0, 200, 980, 990), shift).tolist() == [150, 260, 1000, 1000]
    swapped = as_released.project((400.0, 700, 100, 200), shift).tolist()
    assert swapped == [150, 260, 450, 760]


def giou_by_hand(a, b):
    """Of numbers, as the released code has it."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    sizes = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    iou = shared / (sum(sizes) - shared)
    wide = max(a[2], b[2]) - min(a[0], b[0])
    high = max(a[3], b[3]) - min(a[1], b[1])
    return iou - (wide * high - sum(sizes) * (1 - iou)) / (wide * high)


def test_the_value_is_that_of_the_formula():
    """Boxes apart, one in the other, across; first and second are the same to it."""
    boxes = [(0, 0, 10, 30), (40, 5, 47, 100), (2, 3, 5, 7), (-5, 10, 60, 20), (3, 1, 9, 33)]
    for a in boxes:
        for b in boxes:
            wanted = giou_by_hand(a, b)
            assert as_released.giou(a, b).item() == pytest.approx(wanted, abs=1e-9)
            pair = torch.tensor([[a, b], [b, a]]).double()
            both = as_released.giou(pair, pair.flip(1))
            assert both.flatten().tolist() == pytest.approx([wanted] * 4, abs=1e-9)


def random_cases(count=20_000):
    rng = np.random.default_rng(0)
    sizes = rng.uniform(100, 700, (count, 2))
    corners = rng.uniform(0, 1, (count, 2)) * (1000 - sizes)
    view = ViewConfig(literal_pixels=True)
    matrices = [draw_view(rng, H, W, view).matrix_px for _ in range(count)]
    boxes = np.concatenate([corners, corners + sizes], 1)
    return torch.as_tensor(boxes), torch.stack(matrices)


def test_a_perfect_grounder_scores_like_a_constant_full_image():
    boxes, matrices = random_cases()
    perfect = geometry.project_1000(boxes, matrices, H, W, "corners")
    full = torch.tensor([0.0, 0, 1000, 1000], dtype=torch.float64).expand_as(boxes)
    grounder = as_released.r_geo(boxes, perfect, matrices).mean().item()
    constant = as_released.r_geo(full, full, matrices).mean().item()
    assert grounder == pytest.approx(0.546, abs=0.005)
    assert constant == pytest.approx(0.542, abs=0.005)


def test_empty_hulls_score_nothing():
    assert value((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_the_ghost_is_cut_at_one_sigma():
    released = ghost_lengths(H, W, GhostConfig(radius_sigmas=1))
    assert (released.sigma, 2 * released.radius + 1) == (25, 51)
    assert (as_released.SIGMA_PX, as_released.RADIUS_PX) == (25, 25)
    assert 2 * ghost_lengths(H, W, GhostConfig()).radius + 1 == 151
    assert as_released.blur_spread_px() == pytest.approx(13.7, abs=0.05)
    # by hand: weights e^-1/2 and e^-2 at one and two taps either side
    near = 2 * np.exp(-0.5)
    far = 2 * np.exp(-2.0)
    spread = np.sqrt((near + 4 * far) / (1 + near + far))
    assert as_released.blur_spread_px(1, 2) == pytest.approx(spread, abs=1e-12)
    assert as_released.blur_spread_px(radius=75) == pytest.approx(24.7, abs=0.1)


def test_the_log_prob_span_begins_inside_the_image():
    """Prompt of 12 tokens, one of them an image placeholder that became 300: everything from
    position 12 is averaged.
    """
    prompt = 4 + 300 + 7
    completion = 22
    length = prompt + completion
    logprob = torch.cat([torch.full((prompt,), -9.0), torch.full((completion,), -1.0)])
    span = as_released.scored_span(4 + 1 + 7, length)
    assert (span.start, span.stop) == (12, 333)
    mean = as_released.mean_logprob(logprob, 4 + 1 + 7).item()
    assert mean == pytest.approx((-9 * (length - 12 - completion) - completion) / (length - 12))
    assert logprob[-completion:].mean() == -1  # the span that was sampled


def test_the_preset_uses_them():
    config = load(None, ["--reward.preset=as_released"])
    assert config.ghost.radius_sigmas == 1.0
    assert config.update.kl == "k1_loss"
    assert config.view.literal_pixels
    assert config.reward.sem == "paper"
    assert config.reward.projection == "corners"
    assert not config.reward.soft
