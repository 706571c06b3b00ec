"""The door to the other ranks: what torchrun, accelerate or Ray said in the environment; nobody
else where nothing is said.

    torchrun --nproc-per-node 2 -m vise_fast.train ...
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vise_fast.ranks.meeting import fresh_name
from vise_fast.ranks.ranks import Alone, Ranks
from vise_fast.ranks.together import Lines, Together
from vise_fast.system.errors import (
    ConfigError,
    EnvironmentFault,
    LostRank,
    SaidElsewhere,
    UserError,
)

ARRIVAL = timedelta(minutes=10)
"""For the slowest process to start; machines queue."""
PATIENCE = timedelta(days=7)
"""Of an exchange: rank 0 may evaluate for hours. Who is gone is noticed otherwise."""
SAID = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def joined(environ: Mapping[str, str] = os.environ) -> Iterator[Ranks]:
    """The ranks that this process is one of. Raises ConfigError for an environment that cannot be
    meant, EnvironmentFault where the others do not come.
    """
    count = _number(environ, "WORLD_SIZE", 1)
    if count == 1:
        yield Alone()
        return
    made = not dist.is_initialized()  # some launchers make the group themselves
    together = _join(environ, count)
    try:
        yield together
        _end(together, made)
    except BaseException as fault:
        together.leave(_code(fault))
        if not isinstance(fault, UserError) or isinstance(fault, SaidElsewhere | LostRank):
            raise
        if not together.speaks():  # one fault, one line
            raise SaidElsewhere(fault.code) from fault
        if together.rank > 0:
            fault.args = (f"rank {together.rank}: {fault}",)
        raise
    finally:
        together.close()


def _end(together: Together, made: bool) -> None:
    """A good end. After another one exchanges may be under way, and closing would wait for them."""
    together.end()
    if made and not together.left:
        dist.destroy_process_group()


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text[:40]} in the environment is no number; start by torchrun")
    return int(text)


def _code(fault: BaseException) -> int:
    """What a process that ends by this fault leaves with."""
    code = getattr(fault, "code", 1)
    return code if type(code) is int else 1


def _join(environ: Mapping[str, str], count: int) -> Together:
    missing = [name for name in SAID if name not in environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count} but {missing[0]} is not set; several processes are started by "
            "a launcher; use torchrun --nproc-per-node N -m vise_fast.train"
        )
    rank = _number(environ, "RANK", 0)
    cuda = _own_gpu(environ)
    with _reaching(rank, count):
        store = _store(rank, count)
        messages = _messages()
    lines = Lines(messages, messages, "gloo", store)
    together = Together(lines, rank, count, cuda)
    if _distinct(together, cuda):
        # a broken exchange is noticed by polling; NCCL's own watchdog would end the process unsaved
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        lines.gradients = dist.new_group(backend="nccl", timeout=PATIENCE)
        lines.backend = "nccl"
    return together


def _messages() -> Any:
    """Made within the time that it may take to arrive, patient afterwards."""
    group = dist.new_group(backend="gloo", timeout=ARRIVAL)
    group.set_timeout(PATIENCE)
    return group


def _store(rank: int, count: int) -> Any:
    """What these ranks alone write to; all are there then. A launcher may have made the group."""
    if dist.is_initialized():
        return _own_part(dist.distributed_c10d._get_default_store(), rank, count)
    store, _, _ = next(dist.rendezvous("env://", rank, count, timeout=ARRIVAL))
    own = _own_part(store, rank, count)
    shared = dist.PrefixStore("group", own)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=count, timeout=ARRIVAL)
    return dist.PrefixStore("vise_fast", own)


@contextlib.contextmanager
def _reaching(rank: int, count: int) -> Iterator[None]:
    """What goes wrong before the ranks are together is the network's or the launcher's fault."""
    try:
        yield
    except (dist.DistError, RuntimeError, ValueError, TimeoutError) as fault:
        text = " ".join(str(fault).split())[:200]
        raise EnvironmentFault(
            f"rank {rank} of {count} does not reach the others ({text}); look at MASTER_ADDR, "
            "MASTER_PORT and the network, and that all were started"
        ) from fault


def _own_part(store: Any, rank: int, count: int) -> Any:
    """Of a store in which former processes of the run may have left something."""
    name = fresh_name(dist.PrefixStore("meeting", store), rank, count, ARRIVAL.total_seconds())
    return dist.PrefixStore(name, store)


def _own_gpu(environ: Mapping[str, str]) -> int | None:
    """The GPU with the number of this process on its machine, round and round."""
    if not torch.cuda.is_available():
        return None
    index = _number(environ, "LOCAL_RANK", 0) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return index


def _distinct(together: Together, cuda: int | None) -> bool:
    """Whether every rank has a GPU that no other one has, and NCCL to reach it."""
    name = None
    if cuda is not None and dist.is_nccl_available():
        machine = together.everybody[together.rank].machine
        name = f"{machine} {torch.cuda.get_device_properties(cuda).uuid}"
    names = together.gather("gpus", name)
    together.step_done()
    return None not in names and len(set(names)) == together.count
