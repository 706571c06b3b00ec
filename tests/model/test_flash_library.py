"""FlashAttention from a package: which of three names is taken on which card, what is passed over
and why, and that each is called as it wants. Stand-ins take the packages' places.
"""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from vise_fast.model import proofs
from vise_fast.model.attending import attention, flash_library
from vise_fast.model.attending.flash_library import Found, attend, find
from vise_fast.model.tree import Ragged

HOPPER = (9, 0)
AMPERE = (8, 6)
BLACKWELL = (12, 0)
CPU = torch.device("cpu")


def each_row(q, k, v, ends, scale):
    """Causal attention, row by row."""
    rows = []
    for part in zip(*(x.split(ends.diff().tolist()) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1)[None] for x in part]
        options = {"is_causal": True, "scale": scale, "enable_gqa": True}
        rows.append(F.scaled_dot_product_attention(*heads, **options)[0].transpose(0, 1))
    return torch.cat(rows)


def second(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    """As flash-attn 2 and FlashAttention 3 are called: the output alone."""
    assert causal and not dropout_p and cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return each_row(q, k, v, cu_seqlens_q, softmax_scale)


def fourth(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
    """As flash-attn 4 is: it asks for no longest row and gives the log-sum-exp too."""
    assert causal and cu_seqlens_q is cu_seqlens_k
    return each_row(q, k, v, cu_seqlens_q, softmax_scale), None


FUNCTIONS = {"flash_attn.cute": fourth, "flash_attn_interface": second, "flash_attn": second}


def install(monkeypatch, *names):
    """These packages and no others."""
    for name in FUNCTIONS:
        monkeypatch.setitem(sys.modules, name, None)  # ModuleNotFoundError
    for name in names:
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = FUNCTIONS[name]
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    "capability, installed, taken",
    [
        (HOPPER, FUNCTIONS, "flash-attn 4"),
        (HOPPER, ["flash_attn_interface", "flash_attn"], "FlashAttention 3"),
        (HOPPER, ["flash_attn"], "flash-attn 2"),
        (AMPERE, FUNCTIONS, "flash-attn 2"),
        (BLACKWELL, ["flash_attn_interface", "flash_attn"], "flash-attn 2"),
        (AMPERE, ["flash_attn.cute", "flash_attn_interface"], "torch's FlashAttention"),
        (HOPPER, [], "torch's FlashAttention"),
        ((7, 5), FUNCTIONS, "torch's FlashAttention"),
    ],
)
def test_the_best_package_for_the_card_is_taken(monkeypatch, capability, installed, taken):
    install(monkeypatch, *installed)
    found = find(capability)
    assert found.reason == taken
    assert (found.function is None) == taken.startswith("torch")


def test_one_without_the_function_is_passed_over_and_said(monkeypatch):
    install(monkeypatch, "flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    assert find(HOPPER).reason == "flash-attn 2"
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    found = find(HOPPER)
    assert found.function is None
    assert "flash-attn 2 cannot be used (module 'flash_attn' has no attribute" in found.reason


@pytest.mark.parametrize(
    "fault", [ImportError("undefined symbol: _ZN3c10\nmore"), OSError("libcudart.so.12")]
)
def test_one_built_for_another_torch_is_passed_over(monkeypatch, fault):
    install(monkeypatch, "flash_attn")
    real = flash_library.importlib.import_module

    def broken(name):
        if name == "flash_attn_interface":
            raise fault
        return real(name)

    monkeypatch.setattr(flash_library.importlib, "import_module", broken)
    assert find(HOPPER).reason == "flash-attn 2"


def test_a_cpu_needs_none(monkeypatch):
    install(monkeypatch, *FUNCTIONS)
    assert flash_library.of(CPU).function is None


@pytest.fixture
def on_a_card(monkeypatch):
    """A CPU stands in for a GPU whose rows are attended side by side, by what `use` is given."""
    monkeypatch.setattr(attention, "takes_packed", lambda q: True)

    def use(function):
        def of(device):
            off = flash_library._off is not None
            return Found(None if off else function, "stand-in")

        monkeypatch.setattr(flash_library, "of", of)

    yield use
    flash_library.switch_off(None)


@pytest.mark.parametrize("function", [second, fourth])
def test_packed_rows_go_through_it_forwards_and_backwards(on_a_card, function):
    on_a_card(function)
    rag = Ragged([9, 1, 30], CPU)
    torch.manual_seed(0)
    shapes = ((40, 6, 16), (40, 2, 16), (40, 2, 16))
    qkv = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    out = attention.attend_packed(*qkv, rag, 0.25)
    wanted = each_row(*qkv, rag.ends, 0.25)
    torch.testing.assert_close(out, wanted)
    found = torch.autograd.grad(out.square().sum(), qkv)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), qkv))


def test_a_wrong_one_is_found_out_and_only_it_is_off(on_a_card, monkeypatch):
    """It attends across rows: torch's own goes on."""

    def across(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False):
        return each_row(q, k, v, cu_seqlens_q[[0, -1]], softmax_scale)

    calls = []

    def own(q, k, v, rows, scale):
        calls.append(len(q))
        return each_row(q, k, v, rows.ends, scale)

    on_a_card(across)
    monkeypatch.setattr(attention._Packed, "apply", own)
    monkeypatch.setattr(proofs.kernels, "prove", lambda device, dtype: {})
    faults = proofs.asked(CPU, torch.float32)
    assert list(faults) == ["flash-attn"] and "differs by" in faults["flash-attn"]
    said = []
    proofs.apply(faults, said.append)
    assert len(said) == 1 and said[0].startswith("flash-attn differs by")
    before = len(calls)
    rag = Ragged([3, 4], CPU)
    q, k, v = torch.randn(3, 7, 2, 16)
    attention.attend_packed(q, k, v, rag, 0.25)
    assert len(calls) == before + 1


def test_it_is_asked_for_repeatable_sums_where_a_run_wants_them(monkeypatch):
    asked = []

    def noted(q, k, v, cu_seqlens_q, cu_seqlens_k, deterministic=False):
        asked.append(deterministic)
        return q

    x = torch.randn(2, 2, 8)
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)  # noqa: B023
        attend(noted, (x, x, x), (torch.tensor([0, 2], dtype=torch.int32), 2), 1.0)
    assert asked == [False, True]
