"""Fast paths that only a GPU takes prove themselves on the user's own card before the first step,
and the result is remembered: kernels (vise_kernels/proofs.py), fused attention and its way back,
rows side by side, products with results in float32, GELU inside a product.

What disagrees with its plain version, or raises, is off for this run, in one line; the run goes on.
Graphs prove themselves where they are captured (engine/graphed.py). Left out: speed, and what a
larger input would show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from vise_kernels import proofs as kernels
from vise_kernels.dispatch import switch_off, triton

from vise_fast import __version__
from vise_fast.model import products
from vise_fast.model.attending import flash, flash_library
from vise_fast.model.attending.attention import attend, attend_packed, attend_plain
from vise_fast.model.tree import Grid, Part, Ragged
from vise_fast.system import files
from vise_fast.system.errors import EnvironmentFault
from vise_fast.system.machine.memory import exhausted

BOUND = 4e-2
"""Largest difference, of the largest entry, in bfloat16."""
Faults = dict[str, str]
"""{path: what was seen}"""


def prove_here(device: torch.device, say: Callable[[str], None]) -> Faults:
    """Ask every fast path on this GPU, or remember what they answered; switch off what is wrong and
    say so.
    """
    place = place_of(device)
    faults = _remembered(place)
    if faults is None:
        faults = asked(device, torch.bfloat16)
        _remember(place, faults, say)
    apply(faults, say)
    return faults


def remembered(device: torch.device) -> Faults | None:
    """What was found earlier on this GPU with these versions; None: nothing was asked yet."""
    return _remembered(place_of(device))


def asked(device: torch.device, dtype: torch.dtype) -> Faults:
    """Every fast path beside its plain version, now."""
    faults = kernels.prove(device, dtype)
    for name, run in OTHERS.items():
        fault = _fault(run, device, dtype)
        if fault is not None:
            faults[name] = fault
    return faults


def apply(faults: Faults, say: Callable[[str], None]) -> None:
    """Switch off what is named, and nothing else."""
    own = {name: fault for name, fault in faults.items() if name not in OTHERS}
    switch_off(own)
    flash.switch_off(faults.get("attention") or faults.get("packed attention"))
    flash_library.switch_off(faults.get("flash-attn"))
    products.switch_off({name for name in products.FAST if name in faults})
    for name, fault in faults.items():
        say(f"{name} {fault} on this GPU: its plain version runs, slower")


# ---- what is asked beside kernels ----------------------------------------------------------------


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _attention(device: torch.device, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    """A shared ragged bank, a bank for each row, own tokens; forwards and backwards."""
    grid = Grid([0, 0, 1, 2, 2], 3, device)
    lengths = torch.tensor([11, 1, 7]).to(device)
    q = _draw(device, dtype, 5, 13, 6, 64).requires_grad_()
    shapes = ((3, 2, 11, 64), (5, 2, 16, 64), (5, 2, 13, 64))
    keys = [_draw(device, dtype, *shape).requires_grad_() for shape in shapes]
    values = [_draw(device, dtype, *shape).add_(1).requires_grad_() for shape in shapes]
    parts = [
        Part(keys[0], values[0], lengths, grid),
        Part(keys[1], values[1]),
        Part(keys[2], values[2], causal=True),
    ]
    out = (attend if fast else attend_plain)(q, parts, 0.125)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [q, *keys, *values])]


def _packed(device: torch.device, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    """By torch's own kernel."""
    with flash_library.without():
        return _by_package(device, dtype, fast)


def _by_package(device: torch.device, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    """Rows of three lengths side by side, by flash-attn where it is installed; forwards and
    backwards.
    """
    rag = Ragged([9, 1, 30], device)
    q = _draw(device, dtype, 40, 6, 64).requires_grad_()
    k = _draw(device, dtype, 40, 2, 64).requires_grad_()
    v = (_draw(device, dtype, 40, 2, 64) + 1).requires_grad_()
    if fast:
        out = attend_packed(q, k, v, rag, 0.125)
    else:
        keys, values = (rag.pad(t).transpose(1, 2) for t in (k, v))
        own = Part(keys, values, causal=True)
        out = rag.pack(attend_plain(rag.pad(q), [own], 0.125))
    grads = torch.autograd.grad(out.float().square().sum(), [q, k, v])
    return [out.detach(), *grads]


def _wide(device: torch.device, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    left = _draw(device, dtype, 16, 70)
    right = _draw(device, dtype, 70, 40)
    if fast:
        return [products.wide(left, right, torch.float32)]
    return [left.float() @ right.float()]


def _gelu(device: torch.device, dtype: torch.dtype, fast: bool) -> list[Tensor]:
    x = 2 * _draw(device, dtype, 9, 32)
    weight = _draw(device, dtype, 48, 32)
    bias = _draw(device, dtype, 48)
    with torch.no_grad():
        if fast:
            return [products.linear_gelu_tanh(x, weight, bias)]
        wide = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        return [torch.nn.functional.gelu(wide, approximate="tanh")]


OTHERS: dict[str, Callable[[torch.device, torch.dtype, bool], list[Tensor]]] = {
    "attention": _attention,
    "packed attention": _packed,
    "flash-attn": _by_package,
    "wide product": _wide,
    "gelu in a product": _gelu,
}


def _fault(
    run: Callable[[torch.device, torch.dtype, bool], list[Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """What was seen, in words; None where both ways agree."""
    try:
        pairs = zip(run(device, dtype, True), run(device, dtype, False), strict=True)
        far = max(_gap(found, wanted) for found, wanted in pairs)
    except Exception as fault:  # whatever a driver, a library or a launch raises
        if exhausted(fault):  # says nothing of the path
            raise
        line = next(iter(str(fault).splitlines()), "")
        return f"{type(fault).__name__}: {line}"[:120]
    return None if far <= BOUND else f"differs by {far:.2g} of the largest"


def _gap(found: Tensor, wanted: Tensor) -> float:
    far = (found.double() - wanted.double()).abs().max().item()
    return far / max(wanted.double().abs().max().item(), 1e-6) if far == far else float("inf")


# ---- what is remembered --------------------------------------------------------------------------


def place_of(device: torch.device) -> Path:
    """The file for this GPU, driver and these versions, in the user's cache folder."""
    words = [__version__, torch.__version__, str(torch.version.cuda)]
    words.append(triton.__version__ if triton is not None else "no triton")
    words += flash_library.versions()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words += [properties.name, f"{properties.major}.{properties.minor}", _driver()]
    key = hashlib.sha256("|".join(words).encode()).hexdigest()[:16]
    return files.user_cache() / "proofs" / f"{key}.json"


def _driver() -> str:
    """The driver's version, where the system tells it."""
    told = Path("/proc/driver/nvidia/version")
    return told.read_text().splitlines()[0] if told.is_file() else "unknown"


def _remembered(place: Path) -> Faults | None:
    """A file that is not as written is asked anew."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        return None
    return found


def _remember(place: Path, faults: Faults, say: Callable[[str], None]) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(place, faults)
    except (OSError, EnvironmentFault) as fault:
        say(f"fast paths are proved again at the next start: {fault}")
