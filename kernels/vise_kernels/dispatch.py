"""Which path an op takes here, and why: triton on a GPU, native C++ on a CPU where it gains, plain
PyTorch everywhere.

Also the one guarded import of Triton: op files take `triton`, `tl` and `jit` from here, so that
they load on machines without it. Leaves out the ops themselves.
"""

import contextlib
import contextvars
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the plain and native paths remain
    triton = None
    tl = None

# op -> does the compiled module have a CPU version of it
NATIVE_OPS = {
    "ghost": True,
    "warp": True,
    "resize": True,
    "patchify": True,
    "token_logprob": True,
    "linear_logprob": False,  # a matmul: PyTorch's own is the fast CPU path
    "linear_logprob_kl": False,
    "sample": True,
    "few_rows": True,
    "attention": True,
    "rms_norm": True,
    "heads": True,
    "swiglu": True,
    "rotate": True,
    "decode_attention": False,  # a CPU decodes in a way of its own
    "recast": False,  # a CPU copies them one by one
    "add_layer_norm": False,  # PyTorch's own is as quick on a CPU
    "raised_norm": False,  # a CPU's products take the low-rank term along (few_rows)
    "raised_swiglu": False,
    "raised_heads": False,
    "up_gradient": False,  # small products: PyTorch's own
    "unpack_nf4": False,  # the library that packed them does it on a CPU
    "unpack_int8": False,
    "merge_attention": False,  # a CPU's kernel takes all parts at once
}
CPU_ONLY = {"attention", "few_rows"}  # no Triton version
PATHS = ("plain", "native", "triton")
FLOATS = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ONLY_FLOAT32 = {"attention", "few_rows"}  # of the native ops without gradients
_PREFERRED: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "preferred path", default=None
)
_OFF: dict[str, str] = {}
Listener = Callable[[str, int, int, int], None]
"""(name, kernels, FLOPs, bytes) of a launch that does not happen"""
_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "who hears of launches", default=None
)


@dataclass(frozen=True)
class Choice:
    """The path an op takes and the reason in words."""

    path: str
    reason: str


def jit(function=None, **options):
    """`triton.jit`, or where Triton is absent the function itself: never launched, since `choose`
    refuses that path.
    """
    if function is None:
        return functools.partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel over `grid`; where the first argument is a tensor without data, only
    tell whoever listens that it would be.
    """
    if isinstance(args[0], Tensor) and args[0].is_meta:
        tensors = [a for a in args if isinstance(a, Tensor)]
        announce(kernel.__name__, moved=sum(t.numel() * t.dtype.itemsize for t in tensors))
    else:
        kernel[grid](*args, **options)


def announce(name: str, count: int = 1, *, flops: int = 0, moved: int = 0) -> None:
    """Tell whoever listens of `count` launches, which tensors without data do not have, of a kernel
    that does so many FLOPs and moves so many bytes.
    """
    listener = _LISTENER.get()
    if listener is not None:
        listener(name, count, flops, moved)


@contextlib.contextmanager
def as_on_a_gpu(listener: Listener) -> Iterator[None]:
    """Inside, tensors without data (meta) take every path that a GPU's would take, and `listener`
    hears name, number, FLOPs and bytes of each kernel that would be launched.
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def stands_for_a_gpu(device: torch.device) -> bool:
    """Whether tensors on `device` have no data and stand for a GPU's (`as_on_a_gpu`)."""
    return device.type == "meta" and _LISTENER.get() is not None


def interpreted() -> bool:
    """True where Triton runs kernels in its interpreter, on CPU tensors."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@functools.cache
def native() -> ModuleType | None:
    """The compiled module, or None where it was not built.

    One that is there but does not load raises ImportError.
    """
    if importlib.util.find_spec("vise_kernels._native") is None:
        return None
    return importlib.import_module("vise_kernels._native")


def compiled() -> ModuleType:
    """The compiled module, for an op whose native path was chosen. RuntimeError: not built."""
    module = native()
    if module is None:
        raise RuntimeError("the native module was not built (python -m vise_kernels.build)")
    return module


def address(tensor: Tensor | None) -> int:
    """Where the data begin, as the native ops take it; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def choose(op: str, device: torch.device, path: str | None = None) -> Choice:
    """The path of `op` for tensors on `device`; `path` forces one.

    ValueError where the forced path cannot run.
    """
    if path is None:
        return _automatic(op, device)
    if path not in PATHS:
        raise ValueError(f"{op}: unknown path {path!r}; one of {', '.join(PATHS)}")
    obstacle = _obstacle(op, device, path)
    if obstacle:
        raise ValueError(f"{op}: path {path!r} cannot run here: {obstacle}")
    return Choice(path, "asked for")


def without_gradients(
    op: str, path: str | None, *operands: Tensor | None, tables: tuple[Tensor, ...] = ()
) -> str:
    """The path of an op whose fast paths record no gradients: native takes float32 and mostly
    bfloat16, one of them for all operands, Triton float16 too and any mixture. `tables` are float32
    in any case. ValueError as `choose`.

    Tensors without data (meta) stand for a GPU's: the op allocates what it would there and launches
    nothing.
    """
    given = [t for t in operands if t is not None]
    if path is None and given[0].is_meta:
        gpu = op not in CPU_ONLY and _PREFERRED.get() is None
        return "triton" if gpu and not _no_gradients(op, "triton", given, tables) else "plain"
    chosen = choose(op, given[0].device, path).path
    if chosen == "plain":
        return chosen
    obstacle = _no_gradients(op, chosen, given, tables)
    if obstacle is None:
        return chosen
    if path is None:
        return "plain"
    raise ValueError(f"{op}: path {path!r} cannot run here: {obstacle}")


def _no_gradients(
    op: str, path: str, operands: list[Tensor], tables: tuple[Tensor, ...]
) -> str | None:
    """Why such operands cannot take `path`, or None."""
    device = operands[0].device
    taken = (torch.float32,) if op in ONLY_FLOAT32 else FLOATS[path]
    mixed = path == "native" and any(t.dtype != operands[0].dtype for t in operands)
    if (
        mixed
        or any(t.dtype not in taken or t.device != device for t in operands)
        or any(t.dtype != torch.float32 or t.device != device for t in tables)
    ):
        return f"it takes {' or '.join(str(dtype)[6:] for dtype in taken)}, all on one device"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*operands, *tables)):
        return "it has no gradients"
    return None


def threads_for(elements: int) -> int:
    """Threads worth starting for a pass over so many elements."""
    return min(torch.get_num_threads(), 1 + elements // 2**18)


def prefer(path: str | None) -> None:
    """From here on every op takes "plain" unless a call says otherwise; None: the best that runs,
    as at the start.
    """
    if path not in (None, "plain"):
        raise ValueError(f"prefer: {path!r}; one of None, 'plain'")
    _PREFERRED.set(path)


def switch_off(faults: dict[str, str]) -> None:
    """From here on these ops take the plain path by themselves, and `available` says why: {op: what
    was seen}. Those that were off before are on again, unless they are named.
    """
    _OFF.clear()
    _OFF.update(faults)


def _automatic(op: str, device: torch.device) -> Choice:
    if _PREFERRED.get() == "plain":
        return Choice("plain", "asked for by `prefer`")
    if op in _OFF:
        return Choice("plain", f"switched off: {_OFF[op]}")
    if stands_for_a_gpu(device):
        return Choice("plain" if op in CPU_ONLY else "triton", "stands for a GPU")
    preferred = "triton" if device.type == "cuda" else "native"
    obstacle = _obstacle(op, device, preferred)
    if obstacle:
        return Choice("plain", obstacle)
    return Choice(preferred, f"{device.type} tensors, {preferred} kernel present")


def _obstacle(op: str, device: torch.device, path: str) -> str | None:
    """Why `path` cannot run `op` on `device`, or None."""
    if path == "triton":
        return "PyTorch is the GPU path of this op" if op in CPU_ONLY else _triton_obstacle(device)
    if path == "native":
        return _native_obstacle(op, device)
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return "Triton needs a GPU (or TRITON_INTERPRET=1 set before it is imported)"
    return None


def _native_obstacle(op: str, device: torch.device) -> str | None:
    if not NATIVE_OPS[op]:
        return "PyTorch is the CPU path of this op"
    if device.type != "cpu":
        return "the native kernels take CPU tensors"
    if native() is None:
        return "the native module was not built (python -m vise_kernels.build)"
    return None


def available() -> dict[str, tuple[str, str]]:
    """{op: (path, reason)} for the device this machine would compute on: its GPU where it has one,
    else its CPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {op: choose(op, device) for op in NATIVE_OPS}
    return {op: (choice.path, choice.reason) for op, choice in chosen.items()}
