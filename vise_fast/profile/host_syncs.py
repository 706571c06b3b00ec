"""What running code makes the host do: the syncs that let a GPU run dry, and the ops it launches.
Watched from outside, on any device.

    with Work(model.parameters()) as work:
        step()
    work.syncs, work.ops

Left out: time (system/machine/clock.py).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from vise_fast.profile.launches import copy_in_a_call, waits

aten = torch.ops.aten
SYNCING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique2 if hasattr(aten, "unique2") else aten._unique2,
}
READS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.cpu: "cpu"}


class Work:
    """Counts what running code makes the host do: `syncs` by cause, `ops` that launch work (views
    do not). Use as `with Work() as work`.

    Seen on a GPU's tensors: aten::_local_scalar_dense (`.item()`, `bool(x)`, `float(x)`), nonzero
    and what hides one (a boolean index, masked_select, unique), copies to the CPU, and copies to
    the GPU that wait (a list in `torch.tensor` or as an index, `.to` without non_blocking). Where
    there is no GPU the same is counted for tensors that would live on one: everything computed
    from `weights` (a model's parameters), until `.cpu()` brings it home; there `.tolist()`,
    `.numpy()` and `.cpu()` are seen as Python calls, and copies to the device are none: launches.py
    counts those. Without `weights` every tensor counts. Not seen: waits inside a native extension.
    """

    def __init__(self, weights: Iterable[torch.Tensor] | None = None) -> None:
        self.syncs: Counter[str] = Counter()
        self.ops = 0
        # by storage: what is written into a view is seen through every other view
        self._away: WeakIdKeyDictionary | None = None
        if weights is not None:
            self._away = WeakIdKeyDictionary({w.untyped_storage(): True for w in weights})

    @property
    def total(self) -> int:
        """Syncs of all causes."""
        return sum(self.syncs.values())

    def away(self, value: object) -> bool:
        """Whether reading this makes the host wait for a device (or would, were there one)."""
        if not isinstance(value, torch.Tensor):
            return False
        if value.device.type != "cpu" or self._away is None:
            return True
        return value.untyped_storage() in self._away

    def follow(self, inputs: Iterable[object], outputs: object) -> None:
        """Results live where their inputs do. outputs: tensors, nested as an op returns them."""
        if not self._away or not any(self.away(x) for x in inputs):
            return
        for x in tree_iter(outputs):
            if isinstance(x, torch.Tensor):
                self._away[x.untyped_storage()] = True

    def bring_home(self, value: torch.Tensor) -> torch.Tensor:
        """A copy that counts as the host's."""
        if self._away is not None:
            value = value.clone()
            self._away.pop(value.untyped_storage(), None)
        return value

    def __enter__(self) -> Work:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(_Reads(self))
        self._modes.enter_context(_Ops(self))
        return self

    def __exit__(self, *exception) -> None:
        self._modes.close()


class _Reads(TorchFunctionMode):
    """Python calls that read a CPU tensor's memory, or copy to a device, without any op."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        cause = copy_in_a_call(function, args, kwargs or {})
        self.work.syncs.update([] if cause is None else [cause])
        result = function(*args, **(kwargs or {}))
        if function in READS and args[0].device.type == "cpu" and self.work.away(args[0]):
            self.work.syncs[READS[function]] += 1
            return self.work.bring_home(result) if function is torch.Tensor.cpu else result
        return result


class _Ops(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        cause, source = _cause(function.overloadpacket, args, kwargs or {}, out)
        if cause and self.work.away(source):
            self.work.syncs[cause] += 1
        self.work.follow(tree_iter((args, kwargs)), out)
        self.work.ops += not function.is_view
        return out


def _cause(packet, args, kwargs, out) -> tuple[str | None, torch.Tensor | None]:
    """Why this op makes the host wait, and for which tensor; (None, None) where it does not."""
    if packet in SYNCING:
        return packet.__name__, args[0]
    if packet in (aten.index, aten.index_put, aten.index_put_):
        masked = any(_is_mask(index) for index in args[1])
        return ("boolean index", args[0]) if masked else (None, None)
    if packet not in (aten.copy_, aten._to_copy):
        return None, None
    source = args[1] if packet is aten.copy_ else args[0]
    if source.device.type != "cpu" and out.device.type == "cpu":
        return "device to host", source
    if source.device.type == "cpu" and out.device.type != "cpu" and waits(packet, args, kwargs):
        return "host to device", out
    return None, None


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)
