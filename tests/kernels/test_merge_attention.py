"""Merged parts against one softmax over all keys: every path on ugly shapes, views, parts that see
nothing.
"""

import pytest
import torch
from excess import assert_close
from trying import draw, runs
from vise_kernels import merge_attention

SHAPES = [(1, 1, 1, 2), (2, 3, 5, 10), (3, 1, 16, 128), (1, 7, 9, 24), (0, 2, 3, 4), (5, 2, 8, 16)]
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3}
PATHS = ("plain", "triton")


def parts(shape, keys):
    """Scores and values of each part, in fp64."""
    n, t, h, d = shape
    scores = [3 * draw(n, t, h, s, seed=i).double() for i, s in enumerate(keys)]
    values = [draw(n, t, h, s, d, seed=i + 9).double() for i, s in enumerate(keys)]
    return scores, values


def attended(scores, values):
    return torch.einsum("nths,nthsd->nthd", scores.softmax(-1), values)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [(4,), (3, 5), (1, 7, 2), (2, 2, 2, 2), (5, 1, 3, 2, 4, 6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_make_the_whole(path, dtype, keys, shape):
    runs("merge_attention", path)
    scores, values = parts(shape, keys)
    outs = [attended(s, v).to(dtype) for s, v in zip(scores, values, strict=True)]
    lses = [s.logsumexp(-1).float() for s in scores]
    found = merge_attention(outs, lses, path=path)
    whole = attended(torch.cat(scores, -1), torch.cat(values, -2))
    bound = DTYPES[dtype]
    assert_close(found.output, whole, absolute=bound, relative=bound)
    total = torch.cat(scores, -1).logsumexp(-1)
    assert_close(found.lse, total, absolute=1e-5, relative=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_views_are_taken_as_they_are(path):
    runs("merge_attention", path)
    outs = [draw(4, 3, 2, 8).transpose(0, 1), draw(3, 4, 8, 2, seed=1).transpose(2, 3)]
    lses = [draw(4, 3, 2, seed=2).transpose(0, 1), draw(2, 3, 4, seed=3).permute(1, 2, 0)]
    found = merge_attention(outs, lses, path=path)
    wanted = merge_attention(
        [out.contiguous() for out in outs], [lse.contiguous() for lse in lses], path="plain"
    )
    assert_close(found.output, wanted.output.double(), absolute=1e-6)
    assert_close(found.lse, wanted.lse.double(), absolute=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("groups", [(1, 3, 2, 4), (2, 2, 4, 2), (3, 1, 1, 5)])
def test_rows_and_heads_in_groups(path, groups):
    runs("merge_attention", path)
    entries, fan, keys, repeat = groups
    shape = (entries * fan, 3, keys * repeat, 8)
    outs = [draw(*shape, seed=i) for i in range(2)]
    lses = [draw(*shape[:3], seed=5 + i) for i in range(2)]
    wanted = merge_attention(outs, lses, path="plain")
    # as attention over shared entries leaves it: (M, KV, F, T, R, D)
    apart = outs[1].unflatten(2, (keys, repeat)).unflatten(0, (entries, fan))
    apart = apart.permute(0, 3, 1, 2, 4, 5).contiguous().permute(0, 2, 3, 1, 4, 5)
    tops = lses[1].unflatten(2, (keys, repeat)).unflatten(0, (entries, fan))
    tops = tops.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    found = merge_attention([outs[0], apart], [lses[0], tops], path=path)
    assert_close(found.output, wanted.output.double(), absolute=1e-6)
    assert_close(found.lse, wanted.lse.double(), absolute=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_part_that_sees_nothing_has_no_share(path):
    runs("merge_attention", path)
    outs = [draw(2, 3, 4, 8), draw(2, 3, 4, 8, seed=1)]
    lses = [draw(2, 3, 4), torch.full((2, 3, 4), -torch.inf)]
    found = merge_attention(outs, lses, path=path)
    assert torch.allclose(found.output, outs[0], atol=1e-6)
    assert torch.allclose(found.lse, lses[0], atol=1e-6)


@pytest.mark.parametrize(
    "outs, lses, words",
    [
        ([], [], "one or more"),
        ([draw(1, 1, 1, 2)], [], "as many"),
        ([draw(1, 1, 2)], [draw(1, 1)], "in groups"),
        ([draw(1, 1, 1, 2), draw(1, 1, 2, 2)], [draw(1, 1, 1)] * 2, "all alike"),
        ([draw(1, 1, 1, 2)], [draw(1, 1, 2)], "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(outs, lses, words):
    with pytest.raises(ValueError, match=words):
        merge_attention(outs, lses)
