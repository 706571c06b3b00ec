"""Out of memory in every phase of a step: halved, done again, the result that of the smaller
micro-batch; the floor and what is no such fault.
"""

import pytest
import torch

from vise_fast.config import schema as configuration
from vise_fast.engine.fast import FastEngine
from vise_fast.images.drawn import Scenes
from vise_fast.method import experience, token_scores
from vise_fast.method.experience import play_batch
from vise_fast.method.learner import Learner
from vise_fast.model import load as model
from vise_fast.model.load import silent
from vise_fast.model.lora_linear import FusedLinear
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.run.out_of_memory import Halving
from vise_fast.system.errors import MemoryFloor
from vise_fast.system.machine.memory import CPU_ALLOCATOR, exhausted

SMALL = [
    "--train.batch=4",
    "--rollout.samples=3",
    "--rollout.views=1",
    "--rollout.box_tokens=18",
    "--rollout.query_tokens=8",
    "--train.lr=1e-3",
]
PHASES = {
    "vision encode": (Qwen3VL, "encode", 1),
    "ghost encode": (Qwen3VL, "encode", 2),
    "prefill": (FastEngine, "prefill", 1),
    "prompt": (FastEngine, "prompt", 2),
    "decode": (Qwen3VL, "decode", 5),
    "ghost verdicts": (FastEngine, "verdict_logits", 1),
    "scores": (FastEngine, "score", 1),
    "second slice": (FastEngine, "score", 4),
    "head": (token_scores, "linear_logprob_kl", 1),
    "backward": (FusedLinear, "_input_gradient", 3),
    "room for the optimizer": (Learner, "_make_room", 1),
}
FAULTS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError(
        f"[enforce fail at alloc_cpu.cpp] {CPU_ALLOCATOR}: can't allocate memory: you tried to "
        "allocate 99 bytes"
    ),
    "python": MemoryError(),
    "cublas": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "runtime": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be reported later"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
}


def run(steps=1, micro=0, prepare=lambda halving: None, words=(), warn=silent):
    """(adapter after `steps` steps, metrics of each, halving)."""
    config = configuration.load(None, [*SMALL, f"--train.micro_batch={micro}", *words])
    policy = model.load(config)
    engine = FastEngine(policy.backbone, policy.tokens)
    learn = Learner(policy, engine, config)
    halving, source, seen = Halving(config, engine, learn, warn), Scenes(config), []

    def attempt(step):
        slices = play_batch(engine, source.batch(step, config.train.batch), config, step)
        return learn.learn(slices, step) | {
            "written": [w for s in slices for w in s.queries.written]
        }

    prepare(halving)
    for step in range(steps):
        seen.append(halving(lambda step=step: attempt(step)) | engine.counters.take())
    return {name: p.detach().clone() for name, p in learn.parameters.items()}, seen, halving


def failing(monkeypatch, owner, name, nth, fault):
    """The nth call of `owner.name` raises `fault`, all others pass."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise fault
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


@pytest.fixture(scope="module")
def undisturbed():
    return {micro: run(micro=micro) for micro in (2, 1)}


@pytest.mark.parametrize("phase", PHASES)
def test_a_halved_step_is_the_step_of_the_smaller_micro_batch(monkeypatch, undisturbed, phase):
    owner, name, nth = PHASES[phase]
    start = 2 if phase == "second slice" else 0
    calls = failing(monkeypatch, owner, name, nth, FAULTS["gpu"])
    adapter, seen, halving = run(micro=start)
    truth, expected, _ = undisturbed[1 if start else 2]
    assert len(calls) >= nth, "the fault was never injected"
    assert halving.halvings == 1 and halving.figures() == {
        "memory_halvings": 1,
        "micro_batch": 1 if start else 2,
    }
    assert all(torch.equal(adapter[name], truth[name]) for name in truth)
    assert seen == expected, "metrics and counters are those of the run that was not disturbed"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_kind_of_exhaustion_is_recognised(monkeypatch, undisturbed, fault):
    failing(monkeypatch, FastEngine, "prefill", 1, FAULTS[fault])
    adapter, _, halving = run()
    assert halving.halvings == 1 and exhausted(FAULTS[fault])


def test_other_faults_are_not_taken_for_exhaustion():
    for words in ("out of resource: shared memory", "CUDA error: an illegal memory access"):
        assert not exhausted(RuntimeError(words))


QUANTISED = {
    "int8": ["--model.quant=int8"],
    "nf4": ["--model.quant=nf4"],
}


@pytest.mark.parametrize("kind", ["none", *QUANTISED])
def test_halving_changes_the_result_by_the_order_of_sums_only(monkeypatch, kind):
    """Same texts; every gradient within 1e-5 of the largest entry (fp32).

    Adapters are not compared: Adam divides by tiny second moments.
    """
    gradients, real = [], Learner._apply

    def keeping(self, *args):
        gradients.append(torch.cat([p.grad.flatten() for p in self.parameters.values()]))
        return real(self, *args)

    monkeypatch.setattr(Learner, "_apply", keeping)
    words = QUANTISED.get(kind, [])
    seen = [run(micro=micro, words=words)[1][0] for micro in (0, 2, 1)]
    for cut, gradient in zip(seen[1:], gradients[1:], strict=True):
        assert seen[0]["written"] == cut["written"] and seen[0]["reward"] == pytest.approx(
            cut["reward"], abs=1e-6
        )
        excess = (gradient - gradients[0]).abs().max() / gradients[0].abs().max()
        assert excess <= 1e-5, f"{excess:.2e}"
        assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", QUANTISED)
def test_slices_of_two_are_the_whole_on_a_quantised_base(kind):
    """After four steps: same texts, and an adapter that differs by a ten-thousandth of its way."""
    words = QUANTISED[kind]
    start, *_ = run(steps=0, words=words)
    whole, seen, _ = run(steps=4, words=words)
    cut, cut_seen, _ = run(steps=4, micro=2, words=words)
    assert [step["written"] for step in seen] == [step["written"] for step in cut_seen]
    way = distance(whole, start)
    assert way > 0.01
    assert distance(whole, cut) < 1e-4 * way


def distance(a, b):
    """Between two adapters, all tensors as one vector."""
    return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_llm_int8_says_that_halving_changes_its_result(monkeypatch, threshold):
    failing(monkeypatch, FastEngine, "prefill", 1, FAULTS["gpu"])
    said = []
    words = ["--model.quant=int8", f"--model.int8_threshold={threshold}"]
    _, _, halving = run(words=words, warn=said.append)
    assert halving.halvings == 1
    assert len(said) == (threshold > 0)
    assert all("int8_threshold 6 (LLM.int8) that changes" in line for line in said)


def test_it_halves_again_and_stays_there(monkeypatch):
    truth, *_ = run(steps=2, micro=1)
    real = experience.play

    def greedy(engine, images, *rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(engine, images, *rest)

    monkeypatch.setattr("vise_fast.method.experience.play", greedy)
    adapter, _, halving = run(steps=2)
    assert halving.halvings == 2
    assert all(torch.equal(adapter[name], truth[name]) for name in adapter)


def test_the_floor_is_one_image(monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("vise_fast.method.experience.play", never)
    said = (
        r"one image at a time \(CUDA out of memory.*\); predicted 0\.\d\d GiB \(.*--model.quant nf4"
    )
    with pytest.raises(MemoryFloor, match=said) as caught:
        run()
    assert caught.value.code == 5


def test_one_image_gives_up_the_shared_forward_before_it_is_the_floor(monkeypatch):
    """At batch 1 nothing can be halved, but the activations kept from the rollout can be computed
    again.
    """
    whole = ["--train.batch=1"]
    truth, *_ = run(words=[*whole, "--train.share_forward=false"])
    failing(monkeypatch, FusedLinear, "_input_gradient", 3, FAULTS["gpu"])
    adapter, _, halving = run(words=whole)
    assert halving.halvings == 1 and halving.config.train.share_forward is False
    assert all(torch.equal(adapter[name], truth[name]) for name in truth)


def test_a_fault_inside_the_optimizer_is_not_done_again(monkeypatch):
    failing(monkeypatch, torch.optim.AdamW, "step", 1, FAULTS["gpu"])
    with pytest.raises(MemoryFloor, match="half moved"):
        run()


def test_other_faults_pass(monkeypatch):
    failing(monkeypatch, FastEngine, "prefill", 1, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run()
