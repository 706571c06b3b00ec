"""decode_attention: against softmax written out in fp64, on ugly shapes; banks may move, hold
rubbish beyond their lengths, and be empty.
"""

import pytest
import torch
from excess import assert_close
from vise_kernels import decode_attention
from vise_kernels.decode_attention import Banks, locate
from vise_kernels.dispatch import choose

PATHS = ["plain", "triton"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# rows, heads, key heads, dim, [(entries, capacity)] per bank
SHAPES = {
    "one token": (1, 1, 1, 16, [(1, 1)]),
    "2B, a group of three": (3, 16, 8, 128, [(1, 200), (1, 37), (3, 24)]),
    "odd dims": (5, 6, 2, 40, [(2, 65), (3, 64), (5, 7)]),
    "many queries per key": (2, 40, 2, 24, [(2, 130)]),
    "long": (1, 2, 1, 64, [(1, 1500), (1, 3)]),
}


def runs(path):
    try:
        choose("decode_attention", torch.device("cpu"), path)
    except ValueError as obstacle:
        pytest.skip(str(obstacle))


def made(shape, dtype=torch.float32, device="cpu", empty=False):
    rows, heads, kv, dim, banks = SHAPES[shape]
    rng = torch.Generator().manual_seed(rows * 100 + dim)

    def bank_of_each():
        return [torch.randn(m, kv, s, dim, generator=rng).to(device, dtype) for m, s in banks]

    keys = bank_of_each()
    values = bank_of_each()
    owner = torch.stack([torch.randint(m, (rows,), generator=rng) for m, _ in banks])
    length = torch.stack(
        [torch.randint(0 if empty else 1, s + 1, (rows,), generator=rng) for _, s in banks]
    )
    length[0] = torch.maximum(length[0], torch.tensor(1))
    q = torch.randn(rows, heads, dim, generator=rng).to(device, dtype)
    return q, Banks(
        keys, values, owner.to(device), length.to(device), locate(keys, values).to(device)
    )


def seen(banks, places, head):
    """What one head of a row sees of each bank, one after the other, in fp64."""
    parts = zip(banks, places, strict=True)
    return torch.cat([bank[entry, head, :length] for bank, (entry, length) in parts]).double()


def truth(q, banks, scale):
    """Row by row and head by head, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    repeat = q.shape[1] // banks.keys[0].shape[1]
    for n in range(q.shape[0]):
        places = list(zip(banks.owner[:, n], banks.length[:, n], strict=True))
        for h in range(q.shape[1]):
            keys = seen(banks.keys, places, h // repeat)
            score = keys @ q[n, h].double() * scale
            out[n, h] = score.softmax(0) @ seen(banks.values, places, h // repeat)
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.float16, 3e-3)])
def test_it_is_softmax_over_all_banks(path, shape, dtype, bound):
    runs(path)
    q, banks = made(shape, dtype, empty=True)
    assert_close(
        decode_attention(q, banks, scale=0.3, path=path),
        truth(q, banks, 0.3),
        absolute=bound,
        relative=bound,
        what=shape,
    )


@pytest.mark.parametrize("path", PATHS)
def test_what_lies_beyond_the_length_is_never_seen(path):
    runs(path)
    q, banks = made("odd dims")
    before = decode_attention(q, banks, scale=0.3, path=path)
    for bank, keys, values in zip(range(3), banks.keys, banks.values, strict=True):
        longest = torch.zeros(len(keys), dtype=torch.int64).scatter_reduce(
            0, banks.owner[bank], banks.length[bank], "amax"
        )
        for entry, length in enumerate(longest):
            keys[entry, :, length:] = torch.nan
            values[entry, :, length:] = torch.nan
    assert torch.equal(decode_attention(q, banks, scale=0.3, path=path), before)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_sees_nothing_is_zero(path):
    runs(path)
    q, banks = made("odd dims")
    banks.length[:, 3] = 0
    out = decode_attention(q, banks, scale=0.3, path=path)
    assert (out[3] == 0).all() and (out[2] != 0).any()


def test_banks_may_move():
    """The table is all that the kernel knows of where they are: other banks, same launch, once it
    is rewritten in place.
    """
    runs("triton")
    q, banks = made("2B, a group of three")
    table = banks.table
    other = (
        [torch.cat([bank, bank.flip(2)], 2) for bank in banks.keys],
        [torch.cat([-bank, bank], 2) for bank in banks.values],
    )
    moved = Banks(*other, banks.owner, banks.length, table)
    table.copy_(locate(*other))
    assert_close(
        decode_attention(q, moved, scale=0.3, path="triton"),
        -truth(q, banks, 0.3),
        absolute=3e-6,
        relative=3e-6,
    )


def test_rows_do_not_touch_each_other():
    runs("triton")
    q, banks = made("2B, a group of three")
    alone = Banks(banks.keys, banks.values, banks.owner[:, 1:2], banks.length[:, 1:2], banks.table)
    together, single = (
        decode_attention(x, b, scale=0.3, path="triton") for x, b in ((q, banks), (q[1:2], alone))
    )
    assert_close(single[0], together[1], absolute=1e-6, relative=1e-6)


def test_misfits_are_named():
    q, banks = made("odd dims")
    with pytest.raises(ValueError, match="owner"):
        decode_attention(q[:2], banks, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[..., :8].contiguous(), banks, scale=1.0)
    with pytest.raises(ValueError, match=r"\(N,H,D\)"):
        decode_attention(q.double(), banks, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        locate([bank.transpose(1, 2) for bank in banks.keys], banks.values)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_on_a_gpu(shape, dtype, bound):
    q, banks = made(shape, dtype, "cuda", empty=True)
    assert_close(
        decode_attention(q, banks, scale=0.3),
        truth(q, banks, 0.3),
        absolute=bound,
        relative=bound,
        what=shape,
    )


@pytest.mark.gpu
@GPU
def test_a_captured_graph_follows_owner_length_and_banks():
    q, banks = made("2B, a group of three", torch.bfloat16, "cuda")
    decode_attention(q, banks, scale=0.3)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, banks, scale=0.3)
    q2, other = made("2B, a group of three", torch.bfloat16, "cuda")
    other = Banks(
        [k.flip(2).contiguous() for k in other.keys],
        other.values,
        other.owner,
        (other.length + 1) // 2,
        other.table,
    )
    banks.table.copy_(locate(other.keys, other.values))
    banks.length.copy_(other.length)
    q.copy_(-q2)
    graph.replay()
    assert_close(out, truth(-q2, other, 0.3), absolute=2e-2, relative=2e-2)
