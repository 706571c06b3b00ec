"""Fast paths beside kernels prove themselves, are remembered, and are switched off by name; a CPU
stands in for the GPU.
"""

import json

import pytest
import torch
from vise_kernels.dispatch import choose, switch_off

from vise_fast.model import products, proofs
from vise_fast.model.attending import flash
from vise_fast.model.proofs import OTHERS, apply, asked, prove_here, remembered

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A cache folder of its own, no kernels asked, nothing off afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proofs.kernels, "prove", lambda device, dtype: {})
    yield
    switch_off({})
    flash.switch_off(None)
    products.switch_off(set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_agree(dtype):
    assert asked(CPU, dtype) == {}


@pytest.mark.parametrize("name", OTHERS)
def test_a_wrong_result_and_a_fault_are_seen(monkeypatch, name):
    def spoilt(device, dtype, fast):
        found = OTHERS[name](device, dtype, fast)
        return [found[0] * (1.2 if fast else 1.0), *found[1:]]

    def raising(device, dtype, fast):
        raise RuntimeError("no kernel image is available\nmore")

    for run, words in ((spoilt, "differs by"), (raising, "no kernel image is available")):
        monkeypatch.setattr(proofs, "OTHERS", {**OTHERS, name: run})
        seen = asked(CPU, torch.float32)
        assert list(seen) == [name] and words in seen[name] and "more" not in seen[name]


def test_memory_that_runs_out_is_no_answer(monkeypatch):
    """Nothing is remembered of a path that had no room."""

    def full(device, dtype, fast):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(proofs, "OTHERS", {"attention": full})
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        prove_here(CPU, lambda line: None)
    assert remembered(CPU) is None


def test_not_a_number_is_seen(monkeypatch):
    def spoilt(device, dtype, fast):
        return [torch.full((3,), torch.nan if fast else 1.0)]

    monkeypatch.setattr(proofs, "OTHERS", {"attention": spoilt})
    assert "attention" in asked(CPU, torch.float32)


def test_what_is_named_is_off_and_said():
    said = []
    faults = {"swiglu": "differs by 1", "attention": "raises", "gelu in a product": "differs by 2"}
    apply(faults, said.append)
    assert "switched off" in choose("swiglu", CPU).reason
    assert flash.choose(CPU, torch.float32).path == "plain"
    assert len(said) == 3 and all("its plain version runs" in line for line in said)
    apply({}, said.append)
    assert "switched off" not in choose("swiglu", CPU).reason
    assert flash.choose(CPU, torch.float32).path == "flash"


def test_what_was_found_is_remembered(monkeypatch):
    calls = []

    def found(device, dtype):
        calls.append(dtype)
        return {"rotate": "differs by 1"}

    monkeypatch.setattr(proofs, "asked", found)
    said = []
    assert remembered(CPU) is None
    for _ in range(2):
        assert prove_here(CPU, said.append) == {"rotate": "differs by 1"}
    assert len(calls) == 1 and len(said) == 2
    assert remembered(CPU) == {"rotate": "differs by 1"}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}'])
def test_a_file_that_is_not_as_written_is_asked_anew(monkeypatch, text):
    place = proofs.place_of(CPU)
    place.parent.mkdir(parents=True)
    place.write_text(text)
    monkeypatch.setattr(proofs, "asked", lambda device, dtype: {})
    assert prove_here(CPU, lambda line: None) == {}
    assert json.loads(place.read_text()) == {}


def test_a_cache_that_cannot_be_written_ends_nothing(monkeypatch, tmp_path):
    (tmp_path / "vise_fast").write_text("a file in the way")
    monkeypatch.setattr(proofs, "asked", lambda device, dtype: {})
    said = []
    assert prove_here(CPU, said.append) == {}
    assert len(said) == 1 and "proved again" in said[0]
