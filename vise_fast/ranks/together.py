"""One of several processes over torch.distributed: messages by gloo, gradients by NCCL where every
rank has a GPU of its own, else by gloo.

One flat fp32 sum of the LoRA gradients per step; everything else is a few kilobytes of pickled
numbers from our own processes. What was exchanged in a step is kept until the step is complete: a
rank that runs out of memory and plays its slice again takes the others' part, and its own first
answer, from there, so that nobody has to repeat anything with it. Waiting is polling: a signal is
heard, and a rank that is gone is noticed (watch.py).
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vise_fast.ranks import figures
from vise_fast.ranks.part import part
from vise_fast.ranks.ranks import never
from vise_fast.ranks.watch import SILENCE_S, Process, Watch
from vise_fast.system.errors import LostRank, SaidElsewhere, UserError
from vise_fast.system.machine.clock import peak_memory
from vise_fast.system.signals import Interrupted

T = TypeVar("T")
LOOK_S = 0.25
"""Between two looks at the others while they are waited for."""
LONGEST_PAUSE_S = 2e-3
AT_ONCE = 2**22
"""Numbers that are gathered at once where gradients are added in the order of ranks."""


@dataclass
class Lines:
    """How ranks reach each other: process groups for messages (CPU) and for gradients, and the
    launcher's store.
    """

    messages: Any
    gradients: Any
    backend: str
    store: Any


@dataclass
class Traffic:
    """Of this rank, since the last look: seconds waited for others and for the network, bytes
    sent.
    """

    waited_s: float = 0.0
    sent_bytes: int = 0
    gradient_bytes: int = 0
    since: float = field(default_factory=time.perf_counter)


class Together:
    """A rank among several. `cuda`: the index of its GPU, None without; `ordered`: gradients are
    added in the order of ranks, which is bitwise repeatable for the same number of ranks.
    """

    def __init__(self, lines: Lines, rank: int, count: int, cuda: int | None = None) -> None:
        self.rank = rank
        self.count = count
        self.cuda = cuda
        self.ordered = False
        self.ended = False
        self.left = False
        self.interrupted: Callable[[], None] = never
        self.traffic = Traffic()
        self._lines = lines
        self._known: dict[str, Any] = {}
        self._watch: Watch | None = None
        self.everybody: list[Process] = self._gathered(Process.here(rank))
        self._watch = Watch(lines.store, self.everybody[rank], self.everybody)

    # ---- what is asked for -----------------------------------------------------------------------

    def part(self, images: int) -> range:
        """Neighbouring places, as many as the others' or one more."""
        return part(images, self.rank, self.count)

    def gather(self, name: str, value: T) -> list[T]:
        """One value of each rank; of a step that is done again, what was gathered first."""
        return self._once(name, lambda: self._gathered(value))

    def total(self, name: str, number: int) -> int:
        """The sum of everybody's."""
        return sum(self.gather(name, number))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """In place. A parameter that nobody has a gradient of keeps none."""
        every = list(parameters)
        theirs = self.gather("gradients there", [p.grad is not None for p in every])
        there = [any(column) for column in zip(*theirs, strict=True)]
        chosen = [p for p, somewhere in zip(every, there, strict=True) if somewhere]
        flat = self._once("gradients", lambda: self._added(_flat(chosen)))
        pieces = flat.split([p.numel() for p in chosen])
        for parameter, piece in zip(chosen, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).clone()

    def step_done(self) -> None:
        """An update is complete: the next one exchanges anew."""
        self._known.clear()

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0. What it raises there is noticed as that rank's end."""
        return self._told(work() if self.rank == 0 else None)

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it went well everywhere. The first rank where it did not
        says so.
        """
        fault: UserError | None = None
        result: Any = None
        try:
            result = work()
        except UserError as raised:
            fault = raised
        codes = self._gathered(0 if fault is None else fault.code)
        failed = [rank for rank, code in enumerate(codes) if code]
        if fault is not None and failed[0] == self.rank:
            raise fault
        if failed:
            raise SaidElsewhere(codes[failed[0]])
        return result

    def node_by_node(self, work: Callable[[], T]) -> T:
        """One process of each machine, then its others."""
        here = self.everybody[self.rank].machine
        leads = next(p.rank for p in self.everybody if p.machine == here) == self.rank
        if leads:
            result = self.agreed(work)
            self.agreed(_nothing)
        else:
            self.agreed(_nothing)
            result = self.agreed(work)
        return result

    # ---- figures ---------------------------------------------------------------------------------

    def work(self, counts: dict[str, int], images: int, device: torch.device) -> dict[str, Any]:
        """Counts added up, and what each rank did (figures.py)."""
        took = time.perf_counter() - self.traffic.since
        own = figures.Share(counts, images, took, peak_memory(device), **self._sent())
        merged = figures.merged(self._gathered(own))
        self.traffic = Traffic()
        return merged

    def _sent(self) -> dict[str, Any]:
        t = self.traffic
        return {
            "waited_s": t.waited_s,
            "sent_bytes": t.sent_bytes,
            "gradient_bytes": t.gradient_bytes,
        }

    def describe(self) -> Mapping[str, Any]:
        """For env.json."""
        places = [f"{p.host}:{p.pid}" for p in self.everybody]
        nodes = len({p.machine for p in self.everybody})
        return {
            "ranks": self.count,
            "nodes": nodes,
            "gradients_by": self._lines.backend,
            "rank_places": places,
        }

    # ---- the end ---------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """The ranks that are gone without a word, as far as it is known now."""
        return [process.rank for process in self._gone()]

    def _gone(self) -> list[Process]:
        watch = self._watch
        if watch is None:
            return []
        return [process for process in watch.gone() if not watch.has_left(process.rank)]

    def leave(self, code: int) -> None:
        """Tell the others that this rank ends the run by itself: nothing is exchanged any more."""
        assert self._watch is not None
        self.ended = True
        self.left = True
        self._watch.leave(code)

    def speaks(self) -> bool:
        """Whether this rank is the first to say why the run ends; asked once."""
        assert self._watch is not None
        return self._watch.speaks()

    def end(self) -> None:
        """All end together, if none left before: rank 0 may have work that others have not."""
        if not self.ended:
            self._gathered(None)
            self.ended = True

    def close(self) -> None:
        """No more looks and beats."""
        assert self._watch is not None
        if self.rank == 0 and self.left:
            self._watch.see_off(self.everybody)
        self._watch.close()

    # ---- sending ---------------------------------------------------------------------------------

    def _once(self, name: str, exchange: Callable[[], T]) -> T:
        if name not in self._known:
            self._known[name] = exchange()
        return self._known[name]

    def _gathered(self, value: T) -> list[T]:
        """Pickled by our own processes, for our own processes."""
        own = _packed(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        group = self._lines.messages
        size = torch.tensor([len(own)])
        self._wait(lambda: dist.all_gather(sizes, size, group=group, async_op=True))
        most = int(max(sizes))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(own)] = own
        found = [torch.empty(most, dtype=torch.uint8) for _ in range(self.count)]
        self._wait(lambda: dist.all_gather(found, padded, group=group, async_op=True))
        self.traffic.sent_bytes += (self.count - 1) * (most + 8)
        pairs = zip(found, sizes, strict=True)
        return [_unpacked(data[: int(size)]) for data, size in pairs]

    def _told(self, value: Any) -> Any:
        """Rank 0's value."""
        group = self._lines.messages
        data = _packed(value)
        size = torch.tensor([len(data)])
        self._wait(lambda: dist.broadcast(size, 0, group=group, async_op=True))
        if self.rank != 0:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(data, 0, group=group, async_op=True))
        return value if self.rank == 0 else _unpacked(data)

    def _added(self, flat: Tensor) -> Tensor:
        """The sum of everybody's fp32 numbers."""
        size = flat.numel() * flat.element_size()
        self.traffic.gradient_bytes += size
        self.traffic.sent_bytes += _sent_bytes(size, self.count, self.ordered)
        group = self._lines.gradients
        if not self.ordered:
            self._wait(lambda: dist.all_reduce(flat, group=group, async_op=True))
            return flat
        for own in flat.split(AT_ONCE):
            found = [torch.empty_like(own) for _ in range(self.count)]
            self._gather_tensors(found, own)
            own.zero_()
            for theirs in found:
                own += theirs
        return flat

    def _gather_tensors(self, found: list[Tensor], own: Tensor) -> None:
        group = self._lines.gradients
        self._wait(lambda: dist.all_gather(found, own, group=group, async_op=True))

    # ---- waiting ---------------------------------------------------------------------------------

    def _wait(self, begin: Callable[[], Any]) -> None:
        """Until an exchange is over. Raises Interrupted, LostRank, SaidElsewhere."""
        start = time.perf_counter()
        try:
            pending = begin()
            self._poll(pending, start)
            pending.wait()
        except (dist.DistError, RuntimeError) as fault:
            self._find_out(fault)
        finally:
            self.traffic.waited_s += time.perf_counter() - start

    def _poll(self, pending: Any, start: float) -> None:
        pause = 2e-5
        looked = start
        while not pending.is_completed():
            self._heed()
            now = time.perf_counter()
            if now - looked > LOOK_S:
                self._look()
                looked = now
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)

    def _heed(self) -> None:
        """A signal is heard; one that came because a rank is gone is told as that."""
        try:
            self.interrupted()
        except Interrupted:
            self._look()
            raise

    def _look(self) -> None:
        """Raises what others did to this run."""
        gone = self._gone()
        if gone:
            raise self._lost(gone)
        left = None if self._watch is None else self._watch.left()
        if left is not None:
            raise Interrupted(left) if left >= 128 else SaidElsewhere(left)

    def _find_out(self, fault: BaseException) -> None:
        """An exchange broke: look who is gone, for as long as one may be silent."""
        end = time.perf_counter() + SILENCE_S + 2 * LOOK_S
        while time.perf_counter() < end:
            self._look()
            time.sleep(LOOK_S / 5)
        raise LostRank(
            f"the ranks lost each other ({' '.join(str(fault).split())[:200]}); the run ends; look "
            "at the network, and go on with --train.resume auto"
        ) from fault

    def _lost(self, gone: list[Process]) -> UserError:
        """The lowest rank that is left says it."""
        numbers = {process.rank for process in gone}
        if self.rank != min(set(range(self.count)) - numbers):
            return SaidElsewhere(LostRank.code)
        lost = gone[0]
        return LostRank(
            f"rank {lost.rank} is gone without a word (process {lost.pid} on {lost.host}: killed, "
            "or out of host memory), so all ranks end; go on with --train.resume auto"
        )


def _nothing() -> None:
    """Work of those who wait."""


def _flat(parameters: list[nn.Parameter]) -> Tensor:
    """Their gradients one after another, fp32; zeros where there is none."""
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([piece.float().flatten() for piece in pieces])


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())


def _sent_bytes(size: int, count: int, ordered: bool) -> int:
    """What each rank sends of a buffer: all of it to everybody, or by a ring, which sends it
    twice in shares.
    """
    return size * (count - 1) if ordered else 2 * size * (count - 1) // count
