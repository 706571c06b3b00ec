"""The proofs that ops give on a user's card, given here in Triton's interpreter: all agree, and
each planted fault is seen, switched off and named.
"""

import importlib
import re
from pathlib import Path

import pytest
import torch
import vise_kernels
from vise_kernels import proofs
from vise_kernels.dispatch import CPU_ONLY, NATIVE_OPS, choose, interpreted, switch_off
from vise_kernels.proofs import PROOFS, Given, prove

CPU = torch.device("cpu")
UNUSED = ("patchify", "_warped_kernel")  # the trainer warps first, then cuts
PACKAGE = Path(vise_kernels.__file__).parent
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def nothing_off():
    yield
    switch_off({})


def only(monkeypatch, *ops):
    monkeypatch.setattr(proofs, "PROOFS", {op: PROOFS[op] for op in ops})


def test_every_op_with_a_triton_path_is_asked():
    assert set(PROOFS) == set(NATIVE_OPS) - CPU_ONLY


def test_every_kernel_is_asked_for(monkeypatch):
    """One that only large inputs take would reach a card unproved."""
    wanted = set()
    met = set()
    for path in PACKAGE.glob("*.py"):
        names = re.findall(r"\blaunch\(\s*(_\w+)", path.read_text())
        if not names:
            continue
        module = importlib.import_module(f"vise_kernels.{path.stem}")

        def noted(kernel, *args, name=path.stem, usual=module.launch, **options):
            met.add((name, kernel.__name__))
            usual(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", noted)
        wanted |= {(path.stem, kernel) for kernel in names}
    assert prove(CPU, torch.float32) == {}
    assert met == wanted - {UNUSED}


@pytest.mark.parametrize("op", PROOFS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_agree(monkeypatch, op, dtype):
    only(monkeypatch, op)
    assert prove(CPU, dtype) == {}


@pytest.mark.parametrize("op", PROOFS)
def test_a_wrong_result_is_seen(monkeypatch, op):
    """The last result of the fast path is spoilt as a wrong kernel would spoil it."""

    def spoilt(given: Given):
        found = PROOFS[op](given)
        if given.path == "triton":
            last = found[-1].clone()
            last.view(-1)[last.numel() // 2] += 9 if last.dtype == torch.uint8 else 99
            found = [*found[:-1], last]
        return found

    monkeypatch.setattr(proofs, "PROOFS", {op: spoilt})
    assert list(prove(CPU, torch.float32)) == [op]


@pytest.mark.parametrize("module, op", [("swiglu", "swiglu"), ("rotate", "rotate")])
def test_a_kernel_that_does_not_launch_is_seen(monkeypatch, module, op):
    def broken(*args, **options):
        raise RuntimeError("Triton Error [CUDA]: invalid argument\nmore")

    monkeypatch.setattr(importlib.import_module(f"vise_kernels.{module}"), "launch", broken)
    only(monkeypatch, op)
    seen = prove(CPU, torch.float32)
    assert seen == {op: "RuntimeError: Triton Error [CUDA]: invalid argument"}


def test_a_kernel_that_writes_nothing_is_seen(monkeypatch):
    module = importlib.import_module("vise_kernels.rms_norm")
    monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setattr(module.torch, "empty_like", torch.zeros_like)
    only(monkeypatch, "rms_norm")
    assert "differs" in prove(CPU, torch.float32)["rms_norm"]


def test_what_is_off_takes_the_plain_path_and_says_why():
    switch_off({"swiglu": "differs by 0.3 of the largest"})
    choice = choose("swiglu", CPU)
    assert choice.path == "plain" and choice.reason == "switched off: differs by 0.3 of the largest"
    assert vise_kernels.available()["swiglu"][0] == "plain"
    assert choose("swiglu", CPU, "triton").path == "triton", "a forced path stays"
    switch_off({})
    assert "switched off" not in choose("swiglu", CPU).reason
