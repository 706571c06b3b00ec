"""Which path each op takes, and why; absent native module, broken native module, no Triton."""

import importlib
import shutil
import sysconfig

import pytest
import torch
import vise_kernels
from vise_kernels import dispatch

OPS = {
    "attention",
    "heads",
    "rms_norm",
    "swiglu",
    "ghost",
    "warp",
    "resize",
    "patchify",
    "token_logprob",
    "linear_logprob",
    "linear_logprob_kl",
    "sample",
    "decode_attention",
    "few_rows",
    "merge_attention",
    "recast",
    "up_gradient",
    "raised_norm",
    "raised_swiglu",
    "raised_heads",
    "add_layer_norm",
    "rotate",
    "unpack_nf4",
    "unpack_int8",
}
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def fresh():
    """`native` forgets what it found, before the test and after it."""
    dispatch.native.cache_clear()
    yield
    dispatch.native.cache_clear()


def test_every_public_op_has_a_path_and_a_reason():
    table = vise_kernels.available()
    public = {name.lower() for name in vise_kernels.__all__ if not name.endswith("_backward")}
    assert set(table) == OPS == public - {"available", "prefer"}
    for path, reason in table.values():
        assert path in dispatch.PATHS and reason


@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="no compiler",
)
def test_where_there_is_a_compiler_the_native_module_is_built():
    assert dispatch.native() is not None, "run python -m vise_kernels.build"
    assert dispatch.choose("ghost", CPU).path == "native"


def test_an_absent_module_leaves_the_plain_path_and_says_how_to_build(fresh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = dispatch.choose("ghost", CPU)
    assert choice.path == "plain" and "vise_kernels.build" in choice.reason
    with pytest.raises(ValueError, match="not built"):
        dispatch.choose("ghost", CPU, "native")


def test_a_broken_module_is_an_error_and_no_silent_fallback(fresh, monkeypatch, tmp_path):
    (tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no machine code")
    monkeypatch.setattr(vise_kernels, "__path__", [str(tmp_path)])
    monkeypatch.delitem(importlib.sys.modules, "vise_kernels._native", raising=False)
    monkeypatch.delattr(vise_kernels, "_native", raising=False)
    with pytest.raises(ImportError):
        dispatch.choose("ghost", CPU)


def test_without_triton_a_gpu_takes_the_plain_path(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    choice = dispatch.choose("ghost", CUDA)
    assert choice.path == "plain" and "Triton" in choice.reason
    assert dispatch.jit(max) is max


@pytest.mark.skipif(dispatch.triton is None, reason="no Triton")
def test_a_gpu_takes_triton():
    assert dispatch.choose("ghost", CUDA).path == "triton"
    assert dispatch.choose("sample", CUDA).path == "triton"
    with pytest.raises(ValueError, match="CPU tensors"):
        dispatch.choose("ghost", CUDA, "native")


def test_forced_paths_are_taken_or_refused(monkeypatch):
    assert dispatch.choose("ghost", CPU, "plain").reason == "asked for"
    with pytest.raises(ValueError, match="quantum"):
        dispatch.choose("ghost", CPU, "quantum")
    with pytest.raises(ValueError, match="PyTorch is the CPU path"):
        dispatch.choose("linear_logprob", CPU, "native")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="GPU"):
        dispatch.choose("ghost", CPU, "triton")
