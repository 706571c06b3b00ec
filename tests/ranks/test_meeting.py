"""Ranks that start again over the store of the dead agree on a name that the dead never had."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from vise_fast.ranks.meeting import fresh_name

SOON_S = 60.0


def met(store, count, order=None, pause=0.0):
    """The names that `count` ranks get, which come in this order."""
    order = order or range(count)
    with ThreadPoolExecutor(count) as pool:
        coming = {}
        for rank in order:
            coming[rank] = pool.submit(fresh_name, store, rank, count, SOON_S)
            time.sleep(pause)
        return [coming[rank].result() for rank in range(count)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_all_get_one_name(order):
    assert len(set(met(HashStore(), 3, order, 0.05))) == 1


def test_every_start_has_another_name_whatever_the_last_one_left():
    store = HashStore()
    names = [met(store, count, order, 0.05)[0] for count, order in STARTS]
    assert len(set(names)) == len(STARTS)


STARTS = [(3, (0, 1, 2)), (3, (0, 2, 1)), (3, (2, 0, 1)), (2, (1, 0)), (4, (3, 0, 2, 1))]


@pytest.mark.parametrize("late", range(3))
def test_nobody_goes_on_with_the_hello_of_one_who_died(late):
    """A rank is missing in a start that ends; those of the next one wait for all of them anew."""
    store = HashStore()
    there = [rank for rank in range(3) if rank != late]
    met(store, 3)
    with ThreadPoolExecutor(2) as pool:  # of the second start one dies before it has come
        lost = [pool.submit(fresh_name, store, rank, 3, 0.3) for rank in there]
        assert all(isinstance(one.exception(), TimeoutError) for one in lost)
    names = {}
    go = [
        threading.Thread(target=lambda r=r: names.update({r: fresh_name(store, r, 3, SOON_S)}))
        for r in there
    ]
    for thread in go:
        thread.start()
    time.sleep(0.2)
    assert not names, "the one that is missing has said hello in a former life only"
    names[late] = fresh_name(store, late, 3, SOON_S)
    for thread in go:
        thread.join()
    assert len(names) == 3 and len(set(names.values())) == 1


def test_who_waits_in_vain_is_told():
    with pytest.raises(TimeoutError, match="not all ranks came within 0.1 seconds"):
        fresh_name(HashStore(), 1, 2, 0.1)
