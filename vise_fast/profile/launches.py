"""What a step makes a GPU's host do, counted without a GPU: kernels launched, copies to the device
that wait, reads home, and the FLOPs and bytes of each kernel.

Tensors on the meta device stand for the GPU's (`as_on_a_gpu`): every branch a GPU takes is taken,
nothing is computed, and what needs a value fails, so that a run that ends has no hidden read.

    with Launches() as seen:
        step()
    seen.by_phase["decode"].launches

A *launch* is a kernel or a graph replay that the host issues; an operator of several kernels counts
as many (KERNELS, to about 10 %). A *blocking copy* waits for the stream: `torch.tensor(list,
device=...)`, a list as an index, `.to` without non_blocking. A *read* brings values home. Left out:
scratch kernels of libraries (split-k sums), and how long anything takes (cards.py).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from vise_kernels.dispatch import as_on_a_gpu

from vise_fast.profile.flops import FORMULAS
from vise_fast.system.machine.clock import Clock

aten = torch.ops.aten
kernels = torch.ops.vise_kernels

FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten._unsafe_view,
    aten.lift_fresh,
}
"""Launch nothing: memory, or another look at it."""

KERNELS = {
    aten.logsumexp: 7,
    aten.isin: 6,
    aten._scaled_dot_product_flash_attention: 2,
    aten._scaled_dot_product_efficient_attention: 2,
    aten._flash_attention_forward: 2,
    aten._flash_attention_backward: 4,
    aten._scaled_dot_product_flash_attention_backward: 4,
    aten._scaled_dot_product_efficient_attention_backward: 4,
    aten.index_add: 2,
    aten.index_copy: 2,
    aten.scatter: 2,
    aten.masked_fill: 2,
    aten.constant_pad_nd: 2,
    aten.cumsum: 2,
    aten.masked_scatter: 5,
    aten.masked_scatter_backward: 5,
    aten.nll_loss_forward: 1,
    kernels.decode_attention: 2,
    kernels.sample: 2,
}
"""Operators of several kernels: an operator out of place that copies first, a scan, a reduction
that torch composes. The others are one.
"""

ROWS_READ = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.take}
"""Read as much of their first argument as they give back."""
ROWS_WRITTEN = {aten.index_copy_, aten.index_put_, aten.scatter_, aten.index_add_}
"""Write as much of their first argument as they are given."""

# torch's multi-tensor kernels: tensors a launch takes, by the number of lists it walks
LIST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


@dataclass
class Tally:
    """What was counted in one phase. `kernels`: how often a kernel of so many (FLOPs, bytes) ran,
    inside replays too; `inside`: kernels inside replays, which are not launches of the host.
    """

    launches: int = 0
    blocking_copies: int = 0
    reads: int = 0
    replays: int = 0
    inside: int = 0
    kernels: Counter[tuple[int, int]] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Tally) -> Tally:
        for name in ("launches", "blocking_copies", "reads", "replays", "inside"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kernels += other.kernels
        self.names += other.names
        return self


class Launches:
    """Counts while it is entered; see the module. `clock` splits the counts by phase.

    On the tensors of `device`: "meta", which stand for a GPU's, or "cpu", where each operator is
    one call and nothing is a copy from home (bench/forecast_check.py).
    """

    def __init__(self, device: str = "meta") -> None:
        self.device = device
        self.by_phase: dict[str, Tally] = {}
        self.clock = _Phases(self)
        self.phase = "other"
        self._replaying = False

    @property
    def total(self) -> Tally:
        """All phases together."""
        whole = Tally()
        for tally in self.by_phase.values():
            whole += tally
        return whole

    @property
    def here(self) -> Tally:
        """The tally of the present phase."""
        return self.by_phase.setdefault(self.phase, Tally())

    def launch(self, name: str, count: int = 1, flops: int = 0, moved: int = 0) -> None:
        """`count` kernels of one operator, which does so many FLOPs and moves so many bytes."""
        tally = self.here
        tally.names[name] += count
        if self._replaying:
            tally.inside += count
        else:
            tally.launches += count
        tally.kernels[flops, moved] += 1
        if count > 1:
            tally.kernels[0, 0] += count - 1

    def block(self, cause: str) -> None:
        """A copy to the device that waits."""
        self.here.blocking_copies += 1
        self.here.names[f"blocking: {cause}"] += 1

    def read(self) -> None:
        """Values brought home."""
        self.here.reads += 1

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """What runs inside is one launch of the host: a graph's replay."""
        self.here.launches += 1
        self.here.replays += 1
        self._replaying = True
        try:
            yield
        finally:
            self._replaying = False

    def __enter__(self) -> Launches:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(as_on_a_gpu(self.launch))
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._modes.close()


class _Phases(Clock):
    """Names the phase that is counted; one inside another bears both names."""

    def __init__(self, seen: Launches) -> None:
        super().__init__()
        self.seen = seen

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs inside under `name`."""
        before = self.seen.phase
        self.seen.phase = name if before == "other" else f"{before}: {name}"
        try:
            yield
        finally:
            self.seen.phase = before


class _Calls(TorchFunctionMode):
    """Python calls that copy from the host on their way to an operator, and fused attention."""

    def __init__(self, seen: Launches) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = kwargs or {}
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            return self._attention(*args[:3])
        cause = copy_in_a_call(function, args, given)
        if cause is not None:
            self.seen.block(cause)
        return function(*args, **given)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        work = 4 * q.numel() * k.shape[2]
        self.seen.launch("scaled_dot_product_attention", 2, work, _bytes((q, k, v, out)))
        return out


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Launches) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = kwargs or {}
        out = function(*args, **given)
        inputs = [x for x in tree_iter((args, given)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        packet = function.overloadpacket
        here = any(x.device.type == self.seen.device for x in inputs + outputs)
        if function.is_view or packet in FREE or not here:
            return out
        if packet in (aten._to_copy, aten.copy_) and any(x.is_meta != out.is_meta for x in inputs):
            self._copied(packet, args, given)
            return out
        formula = FORMULAS.get(packet) or flop_registry.get(packet)
        work = 0 if formula is None else formula(*args, **given, out_val=out)
        count = _count(packet, args) if self.seen.device == "meta" else 1
        self.seen.launch(str(packet), count, work, _moved(packet, inputs, outputs))
        return out

    def _copied(self, packet: Any, args: tuple, given: dict) -> None:
        """From the host: asynchronous, or waiting for the stream."""
        if waits(packet, args, given):
            self.seen.block(str(packet))


def copy_in_a_call(function: Callable, args: tuple, given: dict) -> str | None:
    """The cause, where a Python call copies from the host to a device and waits, before any
    operator is seen.
    """
    if function in (torch.tensor, torch.as_tensor) and _away(given.get("device")):
        return "torch.tensor"
    if function in (Tensor.__getitem__, Tensor.__setitem__) and _indexed_from_home(*args[:2]):
        return "an index from the host"
    return None


def waits(packet: Any, args: tuple, given: dict) -> bool:
    """Whether such a copy, aten._to_copy or aten.copy_, waits for the stream."""
    return not given.get("non_blocking", packet is aten.copy_ and any(args[2:3]))


def _count(packet: Any, args: tuple) -> int:
    """Kernels of one call."""
    name = str(packet).removeprefix("aten.")
    if name.startswith("_foreach_"):
        return _list_launches(args)
    if packet in (aten.addmm, aten.baddbmm):
        return 1 if args[0].dim() == 1 else 2  # another matrix is copied into the result first
    if packet is aten.block_diag:
        return 1 + len(args[0])
    return KERNELS.get(packet, 1)


def _list_launches(args: tuple) -> int:
    """Of a multi-tensor operator over lists of tensors."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    return list_launches(len(lists[0]), len(lists) + 1)


def list_launches(tensors: int, lists: int) -> int:
    """Launches of a multi-tensor kernel over so many tensors, walking so many lists."""
    return -(-tensors // LIST_TENSORS[min(lists, 5)])


def _moved(packet: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if packet in ROWS_READ:
        return _bytes(inputs[1:]) + 2 * _bytes(outputs)
    if packet in ROWS_WRITTEN:
        return 2 * _bytes(inputs[1:])
    return _bytes(inputs + outputs)


def _bytes(tensors: Any) -> int:
    """Read and written once each; what is repeated without a copy, as often as it is stored."""
    return sum(min(x.numel() * x.dtype.itemsize, x.untyped_storage().nbytes()) for x in tensors)


def _away(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"


def _indexed_from_home(tensor: Any, index: Any) -> bool:
    """Whether a tensor of the device is indexed by what lies on the host."""
    if not isinstance(tensor, Tensor) or tensor.device.type == "cpu":
        return False
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list) or (isinstance(p, Tensor) and p.is_cpu) for p in parts)
