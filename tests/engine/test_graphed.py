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
from vise_fast.engine.choose import graphs_of, open_engine
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.graphed import MOST, Decoder, GraphedEngine, bucket, decoder_bytes
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


# ---- graphs that prove themselves ----------------------------------------------------------------


class Replay:
    """Stands for a captured graph: does the step, and then whatever a faulty one would."""

    def __init__(self, decoder, fault=lambda decoder: None):
        self.decoder = decoder
        self.fault = fault

    def replay(self):
        self.decoder._advance()
        self.fault(self.decoder)


def capturing(monkeypatch, capture):
    """A graphed engine whose decoders are captured by `capture`; and the lines it said."""
    said = []
    plain, graphed = engines("gqa2")
    graphed.captures = True
    graphed.say = said.append
    monkeypatch.setattr(Decoder, "capture", capture)
    return plain, graphed, said


def test_a_graph_that_does_what_the_step_does_is_used(monkeypatch):
    def capture(decoder):
        decoder.graph = Replay(decoder)

    plain, graphed, said = capturing(monkeypatch, capture)
    for seed in (0, 7):
        wanted = rollout(plain, images(SIZES), seed=seed)
        assert_same(rollout(graphed, images(SIZES), seed=seed), wanted)
    (decoder,) = graphed.decoders.values()
    assert decoder.proved and not said


FAULTY = {
    "other logits": lambda decoder: decoder.logits.mul_(1.05),
    "one row of others": lambda decoder: decoder.logits[1].neg_(),
    "nothing done": lambda decoder: decoder.logits.zero_(),
    "not a number": lambda decoder: decoder.logits.fill_(torch.nan),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_graph_that_gives_other_logits_is_off_and_said(monkeypatch, fault):
    def capture(decoder):
        decoder.graph = Replay(decoder, FAULTY[fault])

    plain, graphed, said = capturing(monkeypatch, capture)
    for seed in (0, 7):
        wanted = rollout(plain, images(SIZES), seed=seed)
        assert_same(rollout(graphed, images(SIZES), seed=seed), wanted)
    assert graphed.off and not graphed.decoders
    assert len(said) == 1 and "gives other logits" in said[0] and "off in this run" in said[0]


def test_a_graph_that_cannot_be_captured_is_off_and_said(monkeypatch):
    def capture(decoder):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain, graphed, said = capturing(monkeypatch, capture)
    wanted = rollout(plain, images(SIZES))
    assert_same(rollout(graphed, images(SIZES)), wanted)
    assert graphed.off and len(said) == 1
    assert "operation not permitted" in said[0] and "more" not in said[0]


def test_memory_that_runs_out_while_capturing_is_not_a_faulty_graph(monkeypatch):
    def capture(decoder):
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, graphed, said = capturing(monkeypatch, capture)
    with pytest.raises(torch.OutOfMemoryError):
        rollout(graphed, images(SIZES))
    assert not graphed.off and not said


def test_decoders_are_few():
    _, graphed = engines("gqa2")
    for limit in range(2, 2 + 2 * MOST):
        rollout(graphed, images(SIZES[:1]), limit=limit)
    assert len(graphed.decoders) == MOST
    kept = [shape.limit for shape in graphed.decoders]
    rollout(graphed, images(SIZES[:1]), limit=kept[0])
    assert [shape.limit for shape in graphed.decoders] == [*kept[1:], kept[0]]


@pytest.mark.parametrize(
    "words, device, graphs",
    [
        ([], "cuda", True),
        ([], "cpu", False),
        (["--model.graphs=false"], "cuda", False),
        (["--model.quant=nf4"], "cuda", True),
        (["--model.quant=int8", "--model.int8_threshold=6"], "cuda", False),
        (["--model.quant=int8"], "cuda", True),
        (["--model.engine=stock"], "cuda", False),
    ],
)
def test_where_graphs_are_on_by_themselves(words, device, graphs):
    assert graphs_of(load(None, words), device) is graphs


def test_what_a_decoder_keeps_is_foretold():
    plain, graphed = engines("gqa2")
    rollout(graphed, images(SIZES), limit=11)
    (decoder,) = graphed.decoders.values()
    held = [*decoder.buffer.keys, *decoder.buffer.values, decoder.logits]
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in held)
    assert decoder_bytes(plain.backbone, sum(FAN), 11) == size
