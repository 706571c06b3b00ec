"""What the ranks are made of: parts of a batch, figures of all, hashes of weights, shares and
predictions.
"""

import copy

import PIL.Image
import pytest
import torch

from vise_fast.config import schema, share
from vise_fast.estimate import planner
from vise_fast.images.sources import open_source
from vise_fast.model import load as model
from vise_fast.ranks.figures import GIB, Share, merged
from vise_fast.ranks.part import largest, part
from vise_fast.ranks.ranks import Alone
from vise_fast.ranks.watch import runs
from vise_fast.run import agreement
from vise_fast.run.agreement import weights
from vise_fast.system import console
from vise_fast.system.errors import ConfigError


@pytest.mark.parametrize("images,count", [(1, 1), (3, 2), (7, 4), (8, 3), (13, 5), (64, 64)])
def test_parts_follow_each_other_and_differ_by_one(images, count):
    parts = [part(images, rank, count) for rank in range(count)]
    assert [place for own in parts for place in own] == list(range(images))
    sizes = [len(own) for own in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes) == largest(images, count)


def test_a_mean_over_images_stays_one():
    shares = [
        Share({"verdict_spread": spread}, images, 1.0, 0, 0.0, 0, 0)
        for spread, images in ((0.1, 3), (0.4, 1))
    ]
    shares.append(Share({}, 2, 1.0, 0, 0.0, 0, 0))  # no object of its images was seen
    assert merged(shares)["verdict_spread"] == pytest.approx(0.175)


def test_figures_add_up_and_name_the_slowest():
    counts = {"forwards": 3, "micro_batch": 2, "bad_images": 1, "memory_halvings": 1}
    quick = Share(counts, 2, 10.0, GIB, waited_s=5.0, sent_bytes=7, gradient_bytes=4)
    slow = Share(counts | {"micro_batch": 1}, 1, 10.0, 2 * GIB, 0.5, 7, 4)
    found = merged([quick, slow])
    assert (found["forwards"], found["memory_halvings"]) == (6, 2)
    assert (found["micro_batch"], found["bad_images"]) == (2, 1)
    assert found["slowest_rank"] == 1 and found["communication_share"] == 0.05
    assert found["ranks"]["images_per_s"] == pytest.approx([2 / 5, 1 / 9.5])
    assert found["ranks"]["peak_gib"] == [1, 2]


def test_a_hash_of_weights_sees_one_bit_and_an_exchange_of_rows():
    policy = model.load(schema.load(None, []))
    before = weights(policy)
    assert before == weights(policy)
    name, parameter = next(
        (n, p) for n, p in policy.model.named_parameters() if p.dim() == 2 and p.shape[0] > 4
    )
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(torch.int32)[1, 1] ^= 1
        assert weights(policy) != before, name
        parameter.copy_(kept.flip(0))
        assert weights(policy) != before, name
        parameter.copy_(kept)
    assert weights(policy) == before


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1025, 7), (2048,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_sums_take_every_shape(shape, dtype):
    values = torch.zeros(shape, dtype=dtype)
    other = values.clone()
    other.view(-1)[-1] = 1
    assert list(agreement._sums(values)) != list(agreement._sums(other))


def test_a_share_is_the_run_with_fewer_images():
    config = schema.load(None, ["--train.batch=7", "--train.micro_batch=5"])
    assert share.share(config, Alone()) is config
    one = share.of_one(config, 4)
    assert (one.train.batch, one.train.micro_batch) == (2, 2)
    assert config.train.batch == 7
    with pytest.raises(ConfigError, match="8 ranks share batches of 7 images"):
        share.of_one(config, 8)


def test_the_planner_knows_ranks(capsys):
    config = schema.load(None, ["--train.batch=4"])
    alone = planner.plan(config)
    several = planner.plan(config, ranks=2)
    assert several.rehearsed.peak < alone.rehearsed.peak
    parts = several.rehearsed.phases["optimizer"]
    assert parts["exchanged gradients"] == parts["LoRA masters"]
    assert "exchanged gradients" not in alone.rehearsed.phases["optimizer"]
    assert console.run(planner.main, ["--train.batch=4", "--ranks", "2"]) == 0
    assert "each of 2 ranks, with 2 images" in capsys.readouterr().out
    assert console.run(planner.main, ["--ranks", "none"]) == 2


def test_who_runs(tmp_path):
    import os

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not runs(child), "a process that waits to be buried is gone"
    os.waitpid(child, 0)
    assert not runs(child) and runs(os.getpid())


def test_alone_everything_is_its_own():
    alone = Alone()
    assert alone.gather("x", 1) == [1] and alone.total("x", 2) == 2
    assert alone.part(3) == range(3)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    gradient = parameter.grad
    alone.add_gradients([parameter])
    assert parameter.grad is gradient
    assert copy.copy(alone).describe() == {"ranks": 1}


@pytest.mark.parametrize("mixed", [False, True], ids=["one place", "mixed"])
def test_parts_of_a_batch_are_the_batch(tmp_path, mixed):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for number in range(7):
            picture = PIL.Image.new("RGB", (64, 64), (number * 30, 0, 0))
            picture.save(tmp_path / place / f"{number}.png")
    named = f"--data.dir={tmp_path / 'a'}"
    if mixed:
        named = f"--data.mix=[{tmp_path / 'a'}=1, {tmp_path / 'b'}=2]"
    config = schema.load(None, [named, "--data.holdout=0.2"])
    names = {}
    for count in (1, 3):
        sources = [open_source(config, 16, tmp_path) for _ in range(count)]
        names[count] = []
        for step in range(4):
            for rank, source in enumerate(sources):
                images = source.batch(step, 5, part(5, rank, count))
                names[count] += [image.name for image in images]
        for source in sources:
            source.close()
    assert names[3] == names[1]
