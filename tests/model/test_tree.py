"""The engine's nouns against plain loops on ugly shapes: grids, ragged rows, segments, features."""

import pytest
import torch

from vise_fast.model.attending.flash import BIAS_ROW
from vise_fast.model.tree import Features, Grid, KeysValues, Level, Part, Ragged, Segment

OWNERS = {
    "one row": ([0], 1),
    "one entry, five rows": ([0] * 5, 1),
    "a row per entry": ([0, 1, 2], 3),
    "two rows per entry": ([0, 0, 1, 1], 2),
    "out of order": ([1, 0, 1], 2),
    "unequal": ([0, 0, 1], 2),
    "entries that nobody sees": ([2, 2, 0, 2, 0], 4),
    "the last entry unseen": ([0, 1], 3),
}
UNIFORM = {"one row", "one entry, five rows", "a row per entry", "two rows per entry"}
LENGTHS = [[1], [7], [3, 3], [1, 1, 1], [4, 1, 2], [1, 5, 5], [2, 3, 5, 7]]
TAILS = [(), (3,), (2, 5)]


def numbered(*shape):
    """1, 2, 3, ...: no two values alike, none of them the zero of padding."""
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


# ---- Grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", OWNERS)
def test_a_grid_spreads_rows_over_entries_in_order(case, tail):
    owner, entries = OWNERS[case]
    grid = Grid(owner, entries)
    x = numbered(len(owner), *tail)
    assert (grid.rows, grid.entries) == (len(owner), entries)
    assert grid.fan == max(owner.count(entry) for entry in range(entries))
    assert grid.owner.tolist() == owner
    table = torch.zeros(entries, grid.fan, *tail)
    seen = [0] * entries
    for row, entry in enumerate(owner):
        table[entry, seen[entry]] = x[row]
        seen[entry] += 1
    assert torch.equal(grid.spread(x), table)
    assert torch.equal(grid.gather(table), x)


@pytest.mark.parametrize("case", OWNERS)
def test_a_uniform_grid_copies_nothing(case):
    grid = Grid(*OWNERS[case])
    x = numbered(grid.rows, 3)
    table = grid.spread(x)
    assert grid.uniform == (case in UNIFORM)
    assert (table.data_ptr() == x.data_ptr()) == grid.uniform
    assert (grid.gather(table).data_ptr() == table.data_ptr()) == grid.uniform


# ---- Ragged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_ragged_rows_are_padded_with_zeros_and_packed_again(lengths, tail):
    rag = Ragged(lengths, "cpu")
    x = numbered(sum(lengths), *tail)
    table = torch.zeros(len(lengths), max(lengths), *tail)
    start = 0
    for row, length in enumerate(lengths):
        table[row, :length] = x[start : start + length]
        start += length
    assert (rag.count, rag.longest) == (sum(lengths), max(lengths))
    assert torch.equal(rag.pad(x), table)
    assert torch.equal(rag.pack(table), x)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_ragged_knows_its_lengths_and_last_tokens(lengths):
    rag = Ragged(lengths, "cpu")
    lasts = []
    stop = 0
    for length in lengths:
        stop += length
        lasts.append(stop - 1)
    assert rag.last().tolist() == lasts
    if len(set(lengths)) == 1:
        assert rag.valid is None
    else:
        assert rag.valid.tolist() == lengths


@pytest.mark.parametrize("lengths", LENGTHS)
def test_equal_lengths_are_views(lengths):
    rag = Ragged(lengths, "cpu")
    x = numbered(sum(lengths), 3)
    equal = len(set(lengths)) == 1
    assert (rag.pad(x).data_ptr() == x.data_ptr()) == equal
    table = numbered(len(lengths), max(lengths), 3)
    assert (rag.pack(table).data_ptr() == table.data_ptr()) == equal


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_of_padding_reach_nobody(lengths):
    rag = Ragged(lengths, "cpu")
    x = numbered(sum(lengths), 2).requires_grad_()
    weight = numbered(len(lengths), max(lengths), 2)
    (grad,) = torch.autograd.grad((rag.pad(x) * weight).sum(), x)
    assert torch.equal(grad, rag.pack(weight))


@pytest.mark.parametrize("read, count", [("all", 9), ("last", 3), ("none", 0)])
def test_a_level_knows_how_many_states_are_read(read, count):
    rag = Ragged([4, 2, 3], "cpu")
    level = Level(torch.zeros(9, 5), torch.zeros(3, 9), rag, read=read)
    assert level.rows_read() == count


# ---- Segment -------------------------------------------------------------------------------------

LAYERS = 2
HEADS = 3
DIM = 5


def segment(tokens, lengths=None, rows=3, first=0.0):
    """Keys and values of two layers, no two alike; with lengths, rows are as many."""
    rows = rows if lengths is None else len(lengths)
    size = rows * HEADS * tokens * DIM
    whole = first + numbered(2 * LAYERS, size).view(-1, rows, HEADS, tokens, DIM)
    layers = list(whole.unbind(0))
    valid = None if lengths is None else torch.tensor(lengths)
    return Segment(layers[:LAYERS], layers[LAYERS:], valid)


def banks(some):
    """Keys and values of all layers, (N, KV, T, D) each."""
    return [*some.keys, *some.values]


def length_of(some, row):
    return some.tokens if some.lengths is None else int(some.lengths[row])


def written(some, row):
    """The tokens of one row without its padding, per bank."""
    return [bank[row, :, : length_of(some, row)] for bank in banks(some)]


SEGMENTS = {
    "full": {"tokens": 4},
    "one token": {"tokens": 1},
    "ragged": {"tokens": 7, "lengths": [7, 1, 3]},
    "one row": {"tokens": 5, "rows": 1},
    "no row is full": {"tokens": 6, "lengths": [2, 5, 1, 4]},
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("case", SEGMENTS)
def test_selected_rows_are_copies(case, as_tensor):
    whole = segment(**SEGMENTS[case])
    rows = [whole.rows - 1, 0, whole.rows - 1]
    some = whole.select(torch.tensor(rows) if as_tensor else rows)
    assert some.rows == 3 and some.tokens == whole.tokens
    for bank, source in zip(banks(some), banks(whole), strict=True):
        for row, origin in enumerate(rows):
            assert torch.equal(bank[row], source[origin])
        assert bank.data_ptr() != source.data_ptr()
    assert some.counts().tolist() == [length_of(whole, origin) for origin in rows]
    assert (some.lengths is None) == (whole.lengths is None)


def test_a_selection_takes_its_bias_along():
    whole = segment(4)
    whole.bias = numbered(3, 4)
    assert torch.equal(whole.select([2, 0]).bias, whole.bias[[2, 0]])
    assert torch.equal(whole.part(1, None, stop=2).key_bias(), whole.bias[:, :2])


@pytest.mark.parametrize("above", SEGMENTS)
@pytest.mark.parametrize("below", SEGMENTS)
def test_stacked_rows_keep_their_tokens(above, below):
    first = segment(**SEGMENTS[above])
    second = segment(**SEGMENTS[below], first=1e4)
    whole = first.stack(second)
    assert whole.rows == first.rows + second.rows
    assert whole.tokens == max(first.tokens, second.tokens)
    origins = [(first, row) for row in range(first.rows)]
    origins += [(second, row) for row in range(second.rows)]
    for row, (source, origin) in enumerate(origins):
        length = length_of(source, origin)
        assert length_of(whole, row) == length
        for bank, tokens in zip(banks(whole), written(source, origin), strict=True):
            assert torch.equal(bank[row, :, :length], tokens)
            assert not bank[row, :, source.tokens :].any()


@pytest.mark.parametrize("above", SEGMENTS)
@pytest.mark.parametrize("below", SEGMENTS)
def test_a_stack_of_equally_long_rows_has_no_lengths(above, below):
    first = segment(**SEGMENTS[above])
    second = segment(**SEGMENTS[below])
    full = first.lengths is None and second.lengths is None
    assert (first.stack(second).lengths is None) == (full and first.tokens == second.tokens)


def test_a_stack_has_no_graph():
    first = segment(3)
    for bank in banks(first):
        bank.requires_grad_()
    assert not any(bank.requires_grad for bank in banks(first.stack(segment(2))))
    assert not any(bank.requires_grad for bank in banks(first.detach()))


@pytest.mark.parametrize("case", SEGMENTS)
def test_what_is_visible_ends_with_the_row(case):
    some = segment(**SEGMENTS[case])
    bias = some.visible()
    for row in range(some.rows):
        for token in range(some.tokens):
            seen = token < length_of(some, row)
            assert bias[row, token] == (0 if seen else -torch.inf)


@pytest.mark.parametrize("room", [0, 1, 6])
@pytest.mark.parametrize("early", SEGMENTS)
@pytest.mark.parametrize("late", [None, [4, 2, 1], [1, 3, 3]])
def test_joined_rows_see_both_stretches_in_order(early, late, room):
    first = segment(**SEGMENTS[early])
    second = segment(4, late, first=1e4)
    rows = [0, first.rows - 1, 0]
    whole = first.join(torch.tensor(rows), second, room)
    assert (whole.rows, whole.tokens) == (3, first.tokens + second.tokens + room)
    assert whole.lengths is None
    assert (whole.bias is None) == (first.lengths is None and late is None)
    for row, origin in enumerate(rows):
        before = written(first, origin)
        after = written(second, row)
        for bank, left, right in zip(banks(whole), before, after, strict=True):
            assert torch.equal(seen(whole, bank, row, room), torch.cat([left, right], 1))


def seen(whole, bank, row, room):
    """(KV, tokens, D): what a row of a joined segment sees, but for the empty room."""
    stop = whole.tokens - room
    if whole.bias is None:
        return bank[row, :, :stop]
    assert not whole.bias[row, stop:].any(), "what is written into the room will be seen"
    return bank[row, :, :stop][:, whole.bias[row, :stop] == 0]


def test_a_kept_layer_has_a_storage_of_its_own():
    qkv = numbered(2, HEADS, 4, 3 * DIM)
    some = Segment([], [])
    some.keep(KeysValues(qkv[..., :DIM], qkv[..., DIM : 2 * DIM]))
    for kept, source in zip(banks(some), qkv.split(DIM, -1)[:2], strict=True):
        assert torch.equal(kept, source)
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.itemsize
    assert (some.rows, some.tokens) == (2, 4)


# ---- Part ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 16, 33])
def test_the_bias_of_a_ragged_part_hides_its_padding(size):
    lengths = torch.tensor([size, 1, (size + 1) // 2])
    keys = numbered(3, HEADS, size, DIM)
    bias = Part(keys, keys, lengths).key_bias()
    assert bias.shape == (3, size) and bias.dtype == keys.dtype
    assert bias.stride(0) % BIAS_ROW == 0
    for row, length in enumerate(lengths.tolist()):
        assert not bias[row, :length].any()
        assert (bias[row, length:] == -torch.inf).all()
    assert Part(keys, keys).key_bias() is None


# ---- Features ------------------------------------------------------------------------------------

GRIDS = [(2, 4), (1, 1), (3, 5), (2, 2)]


def features():
    """Of four images of unequal size, with two taps."""
    starts = [0]
    for rows, columns in GRIDS:
        starts.append(starts[-1] + rows * columns)
    last = numbered(starts[-1], 3)
    return Features(last, [last * 10, last * 100], list(GRIDS)), starts


@pytest.mark.parametrize("images", [[0], [3, 1], [2, 2, 0], [1, 3, 0, 2]])
def test_selected_images_bring_their_patches(images):
    whole, starts = features()
    some = whole.select(images)
    assert len(some) == len(images)
    assert some.grids == [GRIDS[i] for i in images]
    for found, source in zip([some.last, *some.taps], [whole.last, *whole.taps], strict=True):
        rows = [source[starts[i] : starts[i + 1]] for i in images]
        assert torch.equal(found, torch.cat(rows))


def test_all_images_in_order_are_the_same_object():
    whole, _ = features()
    assert whole.select([0, 1, 2, 3]) is whole
    assert len(whole) == 4
