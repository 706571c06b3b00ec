"""The box on which views agree, and what each digit of an answer is worth to it: against brute
force over whole answers.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from vise_kernels import linear_logprob

from vise_fast.config.schema import RewardConfig, load
from vise_fast.images import geometry
from vise_fast.method.consensus import (
    agreements,
    check,
    consensus,
    digit_logprobs,
    digits_of,
    expected_agreement,
    likelihood,
    target,
)
from vise_fast.method.evidence import Evidence
from vise_fast.model import load as model
from vise_fast.system.errors import ConfigError

COMMA = 11
OPEN, CLOSE = 12, 13
IDS = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]


def answer(*numbers):
    """The ids of a box; numbers as texts."""
    words = [[IDS[int(letter)] for letter in number] for number in numbers]
    ids = [OPEN]
    for n, word in enumerate(words):
        ids += ([COMMA] if n else []) + word
    return [*ids, CLOSE]


def evidence(boxes, views, readable, usable, matrices):
    rows, many = len(boxes), len(views[0])
    return Evidence(
        box_1000=torch.tensor(boxes, dtype=torch.float64),
        readable=torch.ones(rows, dtype=torch.bool),
        view_box_1000=torch.tensor(views, dtype=torch.float64),
        view_readable=torch.tensor(readable),
        view_usable=torch.tensor(usable),
        matrix_px=matrices.expand(rows, many, 3, 3),
        height=torch.full((rows,), 480),
        width=torch.full((rows,), 640),
        seen=torch.ones(rows),
        gone=torch.zeros(rows),
        query_readable=torch.ones(rows, dtype=torch.bool),
        group_size=2,
    )


# ---- the box -------------------------------------------------------------------------------------

PLAIN = torch.eye(3, dtype=torch.float64)
TRUTH = [100.0, 200.0, 300.0, 600.0]


def test_it_is_the_mean_of_the_boxes_projected_back():
    """Seen through a flip, a crop and as it is, each with an error of its own."""
    matrices = torch.stack(
        [PLAIN, geometry.flip_px(640), geometry.crop_px(32, 24, 576, 432, 640, 480)]
    )
    truth = torch.tensor([TRUTH], dtype=torch.float64)
    errors = torch.tensor([[30.0, 0, 0, 0], [0, -60.0, 0, 0], [0, 0, 0, 9.0]], dtype=torch.float64)
    seen = []
    for matrix, error in zip(matrices, errors, strict=True):
        there = geometry.project_1000(truth + error, matrix, 480, 640, "ellipse", clamp=False)
        seen.append(there[0].tolist())
    every = [[True] * 3] * 2
    made = evidence([TRUTH] * 2, [seen] * 2, every, every, matrices)
    found = consensus(made)
    wanted = truth + errors.mean(0)
    torch.testing.assert_close(found.box_1000[:, 0], wanted.expand(2, 4), atol=1e-6, rtol=0)
    assert found.known.all()


def test_a_box_that_lies_partly_outside_the_image_counts_as_it_lies():
    """Cut off before the mean, the first view's right side would be 1000, not 1100."""
    moved = PLAIN.clone()
    moved[0, 2] = -64  # a tenth of the width to the left
    views = [[900.0, 200.0, 1000.0, 400.0], [800.0, 200.0, 880.0, 400.0]]
    every = [[True] * 2] * 2
    made = evidence([TRUTH] * 2, [views] * 2, every, every, torch.stack([moved, PLAIN]))
    wanted = torch.tensor([900.0, 200, 990, 400], dtype=torch.float64)
    found = consensus(made).box_1000[:, 0]
    torch.testing.assert_close(found, wanted.expand(2, 4), atol=1e-6, rtol=0)


def test_views_that_say_nothing_count_for_nothing():
    """An unreadable answer, a box without area, a view that lost every box of the group; and one
    view alone is no consensus.
    """
    good, off = TRUTH, [500.0, 500.0, 900.0, 900.0]
    flat = [100.0, 100.0, 100.0, 400.0]
    views = [[good, off, flat, off, good], [good, off, flat, off, good]]
    views += [[good, off, flat, off, off]] * 2
    readable = [[True, False, True, True, True]] * 4
    usable = [[True, True, True, False, True], [True, True, True, False, False]]
    usable += [[True, True, True, False, False]] * 2
    made = evidence([TRUTH] * 4, views, readable, usable, PLAIN)
    found = consensus(made)
    assert found.known.tolist() == [True, True, False, False]
    torch.testing.assert_close(found.box_1000[:2, 0], torch.tensor([TRUTH] * 2).double())
    one_by_one = consensus(made, of="each")
    assert one_by_one.known.tolist() == [True, True, False, False]
    assert one_by_one.counts[:2].tolist() == [[True, False, False, False, True]] * 2
    assert not one_by_one.counts[2:].any()


def test_each_box_stands_for_itself_where_they_are_not_averaged():
    """Projected back through a flip, and cut off at the image; the mean of both is what it was."""
    matrices = torch.stack([PLAIN, geometry.flip_px(640)])
    views = [[TRUTH, [500.0, 200, 1100, 600]]] * 2
    every = [[True] * 2] * 2
    found = consensus(evidence([TRUTH] * 2, views, every, every, matrices), of="each")
    wanted = torch.tensor([TRUTH, [0.0, 200, 500, 600]]).double()
    torch.testing.assert_close(found.box_1000, wanted.expand(2, 2, 4), atol=1e-6, rtol=0)
    assert found.counts.all() and found.known.all()


def test_the_controls_move_to_the_true_box_and_to_another_images():
    eye = [[True] * 2] * 4
    other = [500.0, 100.0, 900.0, 300.0]
    views = [[TRUTH] * 2] * 2 + [[other] * 2] * 2
    made = evidence([TRUTH] * 4, views, eye, eye, PLAIN)
    own = target(made, RewardConfig())
    assert own.box_1000[:, 0, 0].tolist() == [100, 100, 500, 500]
    another = target(made, RewardConfig(name="shuffled"))
    assert another.box_1000[:, 0, 0].tolist() == [500, 500, 100, 100]
    true = torch.tensor([TRUTH, TRUTH, [0.0] * 4, [0.0] * 4], dtype=torch.float64)
    told = target(replace(made, truth_1000=true), RewardConfig(name="oracle"))
    assert told.box_1000[:, 0].tolist() == true.tolist()
    assert target(made, RewardConfig(name="shuffled"), "each").box_1000[0].tolist() == [other] * 2
    assert told.known.tolist() == [True, True, False, False]


# ---- digits --------------------------------------------------------------------------------------


def test_digits_and_their_places():
    answers = [answer("7", "45", "999", "1000"), [OPEN, CLOSE], answer("012", "3", "40", "05")]
    digits = digits_of(answers, IDS)
    packed = [token for ids in answers for token in ids]
    assert [packed[place] for place in digits.place] == [IDS[d] for d in digits.digit]
    assert digits.box.tolist() == [[7, 45, 999, 1000], [0] * 4, [12, 3, 40, 5]]
    assert digits.row.tolist() == [0] * 10 + [2] * 8
    assert digits.coordinate.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0, 0, 1, 2, 2, 3, 3]
    assert digits.worth.tolist()[:10] == [1, 10, 1, 100, 10, 1, 1000, 100, 10, 1]


@pytest.mark.parametrize(
    "ids",
    [
        answer("1", "2", "3"),
        answer("1", "2", "3", "4", "5"),
        answer("1", "2", "3", "12345"),
        [OPEN, CLOSE],
        [],
    ],
)
def test_an_answer_that_is_no_box_has_no_digits(ids):
    assert len(digits_of([ids], IDS)) == 0
    wanted = torch.tensor([[TRUTH]])
    counts = torch.tensor([[True]])
    assert agreements(digits_of([ids], IDS), wanted, counts).shape == (0, 10)


def test_agreement_of_every_digit_is_that_of_the_answer_with_it():
    """Crossed corners, numbers beyond 1000 and leading zeros included; of three boxes the second
    answer has two.
    """
    answers = [answer("012", "345", "678", "999"), answer("700", "5", "31", "1000")]
    first = [[50.0, 300, 700, 900], [0, 0, 600, 800], [10, 350, 690, 1000]]
    second = [[100.0, 0, 650, 400], [5, 5, 9, 9], [50, 10, 700, 990]]
    wanted_1000 = torch.tensor([first, second], dtype=torch.float64)
    counts = torch.tensor([[True, True, True], [True, False, True]])
    digits = digits_of(answers, IDS)
    found = agreements(digits, wanted_1000, counts)
    packed = [token for ids in answers for token in ids]
    for n, choice in itertools.product(range(len(digits)), range(10)):
        row = int(digits.row[n])
        changed = list(packed)
        changed[digits.place[n]] = IDS[choice]
        start = 0 if row == 0 else len(answers[0])
        own = changed[start : start + len(answers[row])]
        texts = "".join(str(IDS.index(t)) if t in IDS else " " for t in own).split()
        box = torch.tensor([float(text) for text in texts], dtype=torch.float64)
        targets = wanted_1000[row][counts[row]]
        wanted = geometry.iou(geometry.clean_1000(box).expand_as(targets), targets).mean()
        assert found[n, choice] == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_of_the_digits_are_those_of_the_whole_vocabulary(dtype):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(7, 5)).to(dtype)
    head = torch.randn(31, 5).to(dtype)
    banned = torch.zeros(31, dtype=torch.bool)
    banned[[3, 4, 15]] = True
    written = torch.tensor([20, 29, 22, 22, 25, 27, 21])
    own = linear_logprob(hidden, head, written, banned=banned)
    found = digit_logprobs(hidden, head, torch.tensor(IDS), written, own)
    logits = (hidden.double() @ head.double().T).masked_fill(banned, -torch.inf)
    truth = logits.log_softmax(-1)[:, IDS]
    exact = 0.15 if dtype == torch.bfloat16 else 1e-5  # the kernel's own rounding of the logits
    assert (found.double() - truth).abs().max() < exact
    apart = found - found[:, :1]
    torch.testing.assert_close(apart.double(), truth - truth[:, :1], atol=2e-5, rtol=1e-5)


# ---- the term ------------------------------------------------------------------------------------


def test_its_gradient_is_that_of_the_expected_agreement_given_the_prefix():
    """Free logits at each place of two answers, ten digits and a comma: sum over everything that
    could be written there. What no digit says (the comma) is worth the digits' mean.
    """
    torch.manual_seed(1)
    answers = [answer("12", "3", "45", "67"), answer("7", "8", "9", "10")]
    wanted_1000 = torch.tensor([[[10.0, 0, 40, 60]], [[5, 5, 9, 60]]], dtype=torch.float64)
    digits = digits_of(answers, IDS)
    values = agreements(digits, wanted_1000, torch.ones(2, 1, dtype=torch.bool))
    tokens = torch.tensor([len(ids) for ids in answers])
    logits = torch.randn(len(digits), 11, dtype=torch.float64, requires_grad=True)
    loss = expected_agreement(logits.log_softmax(-1)[:, :10], values, digits.row, tokens, 3)
    (found,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    p = logits.softmax(-1)
    mean = (p[:, :10] * values).sum(1) / p[:, :10].sum(1)
    whole = torch.cat([values, mean.detach()[:, None]], 1)
    brute = sum((p[n] @ whole[n]) / len(answers[digits.row[n]]) for n in range(len(digits))) / 3
    (truth,) = torch.autograd.grad(brute, logits)
    torch.testing.assert_close(found, truth, atol=1e-7, rtol=1e-4)
    assert truth.abs().max() > 1e-3


def test_it_is_what_reinforce_estimates_digit_by_digit():
    """The mean over draws of one digit of (agreement - baseline) times log-probability, exactly."""
    torch.manual_seed(2)
    digits = digits_of([answer("3", "2", "9", "8")], IDS)
    wanted_1000 = torch.tensor([[[1.0, 0, 9, 9]]], dtype=torch.float64)
    values = agreements(digits, wanted_1000, torch.ones(1, 1, dtype=torch.bool))
    logits = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    logprob = logits.log_softmax(-1)
    loss = expected_agreement(logprob, values, digits.row, torch.tensor([9]), 1)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    baseline = 0.37
    chance = logprob.detach().exp()
    estimate = (chance * (values - baseline) * logprob).sum() / 9
    (truth,) = torch.autograd.grad(estimate, logits)
    torch.testing.assert_close(found, truth, atol=1e-7, rtol=1e-4)


def test_likelihood_weighs_tokens_by_what_they_are_worth():
    answers = [answer("123", "45", "6", "1000"), [OPEN, CLOSE]]
    weights = [0.1, 1, 0.4, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 1, 1, 0.4, 0.1, 0.1]
    torch.manual_seed(3)
    logprob = torch.randn(len(weights) + 2, requires_grad=True)
    digits = digits_of(answers, IDS)
    worth = torch.tensor([3.0, 0.5])
    found = likelihood(logprob, [len(ids) for ids in answers], digits, 4, worth)
    w = torch.tensor(weights)
    wanted = (3 * (w * logprob[:15]).sum() / w.sum() + 0.5 * logprob[15:].mean()) / 4
    torch.testing.assert_close(found, wanted)
    gradient, truth = (torch.autograd.grad(x, logprob)[0] for x in (found, wanted))
    torch.testing.assert_close(gradient, truth)


# ---- what it understands -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "by", "understood"),
    [
        ("short", "agreement", True),
        ("natural", "agreement", True),
        ("json", "agreement", False),  # the 2 of bbox_2d is a digit, too
        ("json", "likelihood", True),
        ("loc", "likelihood", False),  # 1024 bins, y first
    ],
)
def test_styles_whose_digits_are_understood(style, by, understood):
    words = ["--reward.preset", "consensus", "--update.consensus_by", by, "--prompts.ground", style]
    config = load(None, words)
    policy = model.load(config)
    if understood:
        check(config, policy.tokens)
    else:
        with pytest.raises(ConfigError, match="prompts.ground"):
            check(config, policy.tokens)


@pytest.mark.parametrize(
    "words", [["--rollout.views", "1"], ["--rollout.regrounder", "policy"]], ids=" ".join
)
def test_settings_without_a_consensus_are_refused(words):
    with pytest.raises(ConfigError, match="two views"):
        load(None, ["--reward.preset", "consensus", *words])
