"""What a step makes a GPU's host do, counted on any machine at Qwen3-VL-2B shapes: launches, copies
that wait, reads; and that the counter sees what it should.
"""

import copy

import pytest
import torch
from transformers import AutoConfig
from vise_kernels.dispatch import announce, as_on_a_gpu, choose, stands_for_a_gpu

from vise_fast.config.places import SHAPES
from vise_fast.config.schema import load
from vise_fast.estimate.launches import count_step
from vise_fast.method.step_plan import StepPlan
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.profile.cards import A_LAUNCH, CARDS, SHORTEST, floor, forecast
from vise_fast.profile.launches import Launches, Tally
from vise_fast.profile.minimal import PINNED, Shapes, minimal_step

META = torch.device("meta")
IMAGE = (480, 640)


def shapes(layers=None):
    """Qwen3-VL-2B, or with fewer layers and vision blocks."""
    config = AutoConfig.from_pretrained(SHAPES / "qwen3-vl-2b.json", trust_remote_code=False)
    if layers is not None:
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = layers
        config.vision_config.depth = layers
        config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    return config


def counted(preset, batch, *words, layers=None):
    config = load(
        None,
        [
            "--model.path=Qwen/qwen3-vl-2b",
            "--model.dtype=bfloat16",
            f"--reward.preset={preset}",
            f"--train.batch={batch}",
            f"--rollout.query_tokens={PINNED.query}",
            f"--rollout.box_tokens={PINNED.box}",
            *words,
        ],
    )
    return count_step(config, shapes(layers), [IMAGE] * batch)


@pytest.fixture(scope="module")
def paper():
    return counted("paper", 1)


@pytest.fixture(scope="module")
def depths():
    """The same step at two depths: their difference is a layer."""
    return [counted("paper", 1, layers=layers) for layers in (5, 6)]


def more(depths, phase, kind="launches"):
    near, far = (getattr(seen.by_phase[phase], kind) for seen in depths)
    return far - near


def test_a_paper_step_of_one_image(paper):
    total = paper.total
    assert total.launches <= 6500
    assert total.blocking_copies == 0
    assert total.reads <= 6
    assert total.replays == (PINNED.query - 1) + (PINNED.box - 1)


def test_a_robust_step_of_eight_images():
    total = counted("robust", 8).total
    assert total.launches <= 9000
    assert total.blocking_copies == 0
    assert total.reads <= 8


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_step_on_a_quantised_base(quant):
    total = counted("paper", 1, f"--model.quant={quant}").total
    assert total.launches <= 9000
    assert (total.blocking_copies, total.reads, total.replays) == (0, 6, 34)


def test_kernels_of_a_layer(depths):
    steps = PINNED.query - 1
    assert more(depths, "ask: decode", "inside") <= 12 * steps
    assert more(depths, "ask: decode") <= 0, "nothing of a decode step is launched by hand"
    assert more(depths, "update: backward") <= 100
    assert more(depths, "encode") <= 9


def test_what_a_step_executes_is_close_to_what_it_must(paper):
    config = load(None, ["--reward.preset=paper", "--lora.r=16"])
    least = minimal_step(Shapes.of(shapes(), 16), StepPlan.of(config), PINNED, IMAGE)
    done = sum(flops * count for (flops, _), count in paper.total.kernels.items())
    assert 1 <= done / sum(least.values()) <= 1.10


def test_mixed_sizes_wait_for_nothing():
    config = load(
        None,
        ["--model.path=Qwen/qwen3-vl-2b", "--reward.preset=paper", "--train.batch=3"],
    )
    sizes = [(480, 640), (352, 512), (640, 480)]
    total = count_step(config, shapes(5), sizes).total
    assert total.blocking_copies == 0


def test_a_batch_in_slices_is_counted_slice_by_slice():
    one = counted("paper", 1, "--train.share_forward=false", layers=4)
    two = counted("paper", 2, "--train.micro_batch=1", layers=4)
    assert two.total.replays == 2 * one.total.replays
    for phase in ("encode", "prefill: prefix", "ask: question", "verify: verdicts"):
        assert two.by_phase[phase].launches == 2 * one.by_phase[phase].launches, phase
    assert two.by_phase["optimizer"].launches == one.by_phase["optimizer"].launches


def from_a_list(hidden):
    torch.tensor([0], device=hidden.device)


def without_haste(hidden):
    torch.zeros(1).to(hidden.device)


def by_a_list(hidden):
    hidden[[0]]


@pytest.mark.parametrize("fault", [from_a_list, without_haste, by_a_list])
def test_a_copy_that_waits_is_seen_wherever_it_hides(monkeypatch, fault):
    """Planted before the head: once for every sampled token and verdict, in graphs too."""
    usual = Qwen3VL.logits

    def planted(backbone, hidden):
        fault(hidden)
        return usual(backbone, hidden)

    monkeypatch.setattr(Qwen3VL, "logits", planted)
    answered = PINNED.query + PINNED.box
    assert counted("paper", 1, layers=5).total.blocking_copies >= answered


# ---- the counter itself --------------------------------------------------------------------------


def seen_of(work):
    with Launches() as seen:
        work()
    return seen.total


def blank(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=META)


@pytest.mark.parametrize(
    "work, launches",
    [
        (lambda: blank(3, 4), 0),
        (lambda: blank(3, 4).view(12).t(), 0),
        (lambda: blank(3, 4) + 1, 1),
        (lambda: blank(3, 4) @ blank(4, 5), 1),
        (lambda: torch.addmm(blank(5), blank(3, 4), blank(4, 5)), 1),
        (lambda: torch.addmm(blank(3, 5), blank(3, 4), blank(4, 5)), 2),
        (lambda: blank(3, 5).addmm_(blank(3, 4), blank(4, 5)), 1),
        (lambda: blank(3, 4).logsumexp(-1), 7),
        (lambda: torch.ones(3) + 1, 0),
        (lambda: announce("kernel", 3), 3),
    ],
)
def test_launches_are_seen(work, launches):
    total = seen_of(work)
    assert (total.launches, total.blocking_copies, total.reads) == (launches, 0, 0)


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.tensor([1, 2], device=META),
        lambda: torch.ones(3).to(META),
        lambda: blank(3, 4)[[0, 2]],
        lambda: blank(3, 4)[torch.tensor([0, 2])],
        lambda: blank(3, 4)[:, [1]],
        lambda: blank(3, 4).__setitem__([0], 1.0),
        lambda: blank(3).copy_(torch.ones(3)),
    ],
)
def test_copies_that_wait_are_seen(work):
    assert seen_of(work).blocking_copies == 1


def test_copies_that_do_not_wait_are_none():
    total = seen_of(lambda: torch.ones(3).to(META, non_blocking=True))
    assert (total.launches, total.blocking_copies) == (0, 0)


@pytest.mark.parametrize(
    "read", [lambda x: x.item(), lambda x: x.tolist(), lambda x: bool(x), lambda x: x.cpu()]
)
def test_a_value_cannot_be_read_in_secret(read):
    with pytest.raises((RuntimeError, NotImplementedError)), Launches():
        read(blank(()))


def test_a_replay_is_one_launch_and_its_kernels_stand_apart():
    with Launches() as seen:
        with seen.clock.phase("decode"), seen.replay():
            blank(3) + 1
            blank(3) + 1
        blank(3) + 1
    tally = seen.by_phase["decode"]
    assert (tally.launches, tally.replays, tally.inside) == (1, 1, 2)
    assert seen.by_phase["other"].launches == 1


def test_only_inside_do_tensors_without_data_stand_for_a_gpus():
    assert not stands_for_a_gpu(META)
    with as_on_a_gpu(lambda *what: None):
        assert stands_for_a_gpu(META) and not stands_for_a_gpu(torch.device("cpu"))
        assert choose("sample", META).path == "triton"
    assert choose("sample", META).path == "plain"


@pytest.mark.parametrize(
    "work, moved",
    [
        (lambda: torch.nn.functional.embedding(blank(3, dtype=torch.int64), blank(1000, 4)), 120),
        (lambda: blank(1000, 4).index_select(0, blank(2, dtype=torch.int64)), 80),
        (lambda: blank(9, 4).index_copy_(0, blank(2, dtype=torch.int64), blank(2, 4)), 96),
        (lambda: blank(1, 4).expand(50, 4) + blank(50, 4), 16 + 2 * 800),
    ],
)
def test_rows_that_nobody_touches_move_nowhere(work, moved):
    ((kernel, _),) = [pair for pair in seen_of(work).kernels.items() if pair[0] != (0, 0)]
    assert kernel == (0, moved)


def test_on_a_cpus_tensors_every_operator_is_one_call():
    with Launches("cpu") as seen:
        (torch.ones(3, 4) @ torch.ones(4, 5)).view(15).logsumexp(0)
    assert seen.total.names == {"aten.ones": 2, "aten.mm": 1, "aten.logsumexp": 1}
    assert sum(flops for flops, _ in seen.total.kernels) == 2 * 3 * 4 * 5
    assert seen.total.blocking_copies == 0


# ---- the forecast --------------------------------------------------------------------------------


def test_the_floor_is_the_slower_of_products_and_bytes():
    card = CARDS[0]
    tally = Tally()
    tally.kernels[int(card.flops), 0] = 2
    tally.kernels[0, int(3 * card.bandwidth)] = 1
    tally.kernels[0, 0] = 1000
    assert floor(tally, card) == pytest.approx(2 + 3 + 1000 * SHORTEST)


def test_the_sum_rule_adds_the_host_and_the_max_rule_hides_it(paper):
    for card in CARDS:
        found = forecast(paper, card)
        waiting = paper.total.launches * A_LAUNCH
        assert found.sum == pytest.approx(found.floor + waiting)
        assert found.floor <= found.max <= found.sum
