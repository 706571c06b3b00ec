"""Graphed decoding samples what the plain engine samples; one decoder serves rollout after rollout,
whatever moved in between.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import SHAPES, TinyTokens, build, images

from vise_fast.config.schema import load
from vise_fast.engine.choose import open_engine
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import GraphedEngine, bucket
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.system.errors import EnvironmentFault

SIZES = [(16, 24), (8, 8), (24, 16), (16, 24)]
ROWS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]
FAN = [3, 1, 2, 1]


class Brief(TinyTokens):
    """Many ids end an answer, so that answers differ in length."""

    eos = list(range(50, 67))


def engines(shape, device="cpu", dtype=torch.float32):
    backbone = Qwen3VL(build(shape, dtype=dtype).to(device))
    return FastEngine(backbone, Brief(), poll=4), GraphedEngine(backbone, Brief(), poll=4)


def rollout(engine, pictures, adapters=True, *, limit=11, temperature=1.0, seed=0):
    count = len(pictures)
    prefixes = engine.prefill(engine.encode(pictures), adapters)
    prompts = engine.prompt(prefixes, list(range(count)), ROWS[:count])
    fan = FAN[:count]
    seeds = list(range(seed, seed + sum(fan)))
    return engine.generate(prompts, fan, limit, seeds, temperature)


def assert_same(a, b, bound=1e-5):
    assert a.rows() == b.rows() and a.lengths == b.lengths
    assert torch.equal(a.ids, b.ids)
    assert (a.logprob - b.logprob).abs().max() < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_it_samples_what_the_plain_engine_samples(shape, adapters, temperature):
    plain, graphed = engines(shape)
    truth = rollout(plain, images(SIZES), adapters, temperature=temperature)
    found = rollout(graphed, images(SIZES), adapters, temperature=temperature)
    assert len(set(truth.lengths)) > 1, "the fixture should mix lengths"
    assert_same(truth, found)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_limits_around_the_first_poll(limit):
    assert_same(*(rollout(engine, images(SIZES), limit=limit) for engine in engines("gqa2")))


def test_one_decoder_serves_other_prefixes_fewer_rows_and_changed_adapters():
    plain, graphed = engines("gqa2")
    for count, seed in ((4, 0), (3, 50), (4, 90)):
        pictures = images(SIZES[-count:], seed=seed)
        assert_same(rollout(plain, pictures, seed=seed), rollout(graphed, pictures, seed=seed))
        with torch.no_grad():
            for master in plain.backbone.layers[0].linears[0].masters():
                master.mul_(-1.5)
        plain.backbone.refresh()
    assert len(graphed.decoders) == 1
    graphed.forget()
    assert not graphed.decoders
    again = rollout(graphed, images(SIZES))
    assert again.lengths == rollout(plain, images(SIZES)).lengths


def test_the_counts_are_those_of_the_plain_engine():
    plain, graphed = engines("gqa2")
    plain.joins = False
    taken = []
    for engine in (plain, graphed):
        rollout(engine, images(SIZES), temperature=0.0)
        taken.append(engine.counters.take())
    for name in ("host_reads", "forwards", "decode_steps"):
        assert taken[0][name] == taken[1][name], name


def test_prefixes_are_let_go():
    _, graphed = engines("gqa2")
    prefixes = graphed.prefill(graphed.encode(images(SIZES)), True)
    prompts = graphed.prompt(prefixes, [0, 1, 2, 3], ROWS)
    del prefixes
    graphed.generate(prompts, [1, 1, 1, 1], 3, seeds=[0, 1, 2, 3])
    held = weakref.ref(prompts.prefixes.segment.keys[0])
    del prompts
    gc.collect()
    assert held() is None


def test_an_interrupt_is_heard_between_layers_and_at_a_poll():
    _, graphed = engines("gqa2")
    heard = []
    graphed.interrupted = lambda: heard.append(graphed.counters.decode_steps)
    rollout(graphed, images(SIZES), temperature=0.0)
    assert heard[0] == 0, "between the layers of the prefill"
    assert next(steps for steps in heard if steps) == 7


def test_without_a_gpu_they_are_refused():
    config = load(None, ["--model.graphs", "true"])
    policy = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(EnvironmentFault, match="model.graphs"):
        open_engine(policy, config)


def test_buckets_hold_their_rows_and_are_few():
    rows = (1, 2, 3, 5, 8, 9, 33, 64, 65, 200)
    assert [bucket(n) for n in rows] == [1, 2, 4, 8, 8, 16, 40, 64, 96, 224]
    assert all(bucket(n) >= n for n in range(1, 300))
    assert len({bucket(n) for n in range(1, 257)}) == 17


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_replayed_graphs_sample_what_the_plain_engine_samples(shape):
    plain, graphed = engines(shape, "cuda")
    for seed in (0, 50):
        pictures = [image.cuda() for image in images(SIZES, seed=seed)]
        for adapters in (True, False):
            truth = rollout(plain, pictures, adapters, seed=seed)
            found = rollout(graphed, pictures, adapters, seed=seed)
            assert_same(truth, found, bound=1e-3)
        with torch.no_grad():
            for master in plain.backbone.layers[0].linears[0].masters():
                master.mul_(-1.5)
        plain.backbone.refresh()
    assert len(graphed.decoders) == 2
    assert all(decoder.graph is not None for decoder in graphed.decoders.values())
