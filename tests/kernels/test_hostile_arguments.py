"""Arguments that would make a kernel read or write where nothing of theirs lies, divide by zero, or
ask for more memory than there is: every op refuses them with a sentence, on every path.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import PATHS, device, noise
from test_pointwise import small_turn, turned
from vise_kernels import (
    attention,
    decode_attention,
    few_rows,
    ghost,
    heads,
    heads_backward,
    linear_logprob,
    patchify,
    resize,
    rms_norm_backward,
    rotate,
    sample,
    swiglu_backward,
    token_logprob,
    warp,
)
from vise_kernels.attention import Bank
from vise_kernels.decode_attention import Banks, locate
from vise_kernels.dispatch import native, triton
from vise_kernels.ghost import MOST_RADIUS, MOST_SIGMA
from vise_kernels.heads import Parts

NATIVE = pytest.mark.skipif(
    native() is None, reason="the native module was not built (python -m vise_kernels.build)"
)
GPU = torch.cuda.is_available()
# which of the paths that are not for images run here, on CPU tensors
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(triton is None or GPU, reason="no interpreter")
)
BOX = torch.tensor([[1, 2, 9, 8]])
MINUTE = torch.zeros(1, 1, 3, dtype=torch.uint8)


def blurred(path, **options):
    return ghost([noise(12, 14).to(device(path))], [0], BOX, path=path, **options)


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["pixelate", "blur", "mean"])
@pytest.mark.parametrize("sigma", [2e9, 1e300, float("inf"), float("nan"), -1.0])
def test_a_ghost_of_any_sigma_is_made_or_refused(path, method, sigma):
    with pytest.raises(ValueError, match="sigma"):
        blurred(path, method=method, sigma=sigma)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("radius", [MOST_RADIUS + 1, 2**31, 2**62, -1])
def test_a_ghost_of_any_radius_is_made_or_refused(path, radius):
    with pytest.raises(ValueError, match="radius"):
        blurred(path, sigma=float(MOST_SIGMA), radius=radius)


@pytest.mark.parametrize("path", PATHS[:2])  # the interpreter takes half a minute
@pytest.mark.parametrize("method", ["pixelate", "blur"])
def test_the_largest_sigma_makes_one_colour(path, method):
    (out,) = blurred(path, method=method, sigma=float(MOST_SIGMA), radius=MOST_RADIUS)
    box = out[2:8, 1:9].int()
    assert (box - box[0, 0]).abs().max() <= 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["pixelate", "blur"])
@pytest.mark.parametrize("sigma", [1e-300, 1e-160, 1e-9])
def test_a_sigma_next_to_nothing_leaves_a_copy(path, method, sigma):
    (out,) = blurred(path, method=method, sigma=sigma)
    assert torch.equal(out.cpu(), noise(12, 14))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [1, -1, 2**40])
def test_an_index_beyond_the_images_is_refused(path, index):
    with pytest.raises(ValueError, match="image_index"):
        ghost([noise(4, 4).to(device(path))], [index], BOX, path=path)


@pytest.mark.parametrize("path", PATHS)
def test_boxes_of_any_numbers_are_clipped(path):
    far = 2**62
    boxes = torch.tensor([[-far, -far, far, far], [far, far, -far, -far], [-far, 3, 5, far]])
    image = noise(12, 14).to(device(path))
    outs = ghost([image], [0, 0, 0], boxes, method="mean", path=path)
    assert len(outs[0].unique(dim=1)[0]) == 1 and torch.equal(outs[1], image)


LARGE = [(2**24, 1), (1, 2**24), (50_000, 50_000)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("op", ["ghost", "warp", "resize", "patchify"])
def test_an_image_with_more_pixels_than_kernels_count_is_refused(op, size, path):
    """The image is one pixel that is everywhere, so that nobody needs its gigabytes."""
    image = MINUTE.expand(*size, 3)
    calls = {
        "ghost": lambda: ghost([image], [0], BOX, path=path),
        "warp": lambda: warp([image], torch.eye(3)[None], path=path),
        "resize": lambda: resize([image], [(4, 4)], path=path),
        "patchify": lambda: patchify([image], patch=1, merge=1, path=path),
    }
    with pytest.raises(ValueError, match="too large"):
        calls[op]()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [*LARGE, (2**40, 2**40), (-1, 4), (4, 0)])
def test_a_resize_to_any_size_is_done_or_refused(path, size):
    with pytest.raises(ValueError, match="resize"):
        resize([MINUTE], [size], path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["patch", "merge", "temporal"])
@pytest.mark.parametrize("value", [0, -2, -(2**40)])
def test_patches_without_pixels_are_refused(path, name, value):
    options = {"patch": 4, "merge": 2, "temporal": 2} | {name: value}
    with pytest.raises(ValueError, match="at least 1"):
        patchify([noise(16, 16)], **options, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("patch, merge", [(2**16, 2**16), (2**31, 2), (1, 2**32), (5, 2)])
def test_patches_larger_than_the_image_are_refused(path, patch, merge):
    with pytest.raises(ValueError, match="multiple"):
        patchify([noise(16, 16)], patch=patch, merge=merge, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("op", ["warp", "patchify"])
def test_a_matrix_that_leads_nowhere_is_refused_by_its_number(op, number, path):
    matrices = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    matrices[1] = number
    images = [noise(8, 8)] * 2
    calls = {
        "warp": lambda: warp(images, matrices, path=path),
        "patchify": lambda: patchify(images, patch=4, merge=1, matrices_px=matrices, path=path),
    }
    with pytest.raises(ValueError, match="matrix 1 cannot be inverted"):
        calls[op]()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e150])
def test_matrices_of_any_finite_numbers_see_something(path, scale):
    """Beyond what float32 and the picture hold; what is seen is a pixel or the border."""
    matrices = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    matrices[0, :2] *= scale
    matrices[1, 2, 0] = scale
    matrices[2, 0, 2] = scale
    image = noise(9, 7).to(device(path))
    for out in warp([image] * 3, matrices, path=path):
        assert out.shape == image.shape


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE), TRITON])
def test_logits_of_no_ids_are_refused(path):
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no ids"):
        token_logprob(torch.zeros(3, 0), ids, path=path)
    with pytest.raises(ValueError, match="no ids"):
        sample(torch.zeros(3, 0), temperature=1.0, seed=ids, position=0, path=path)


@pytest.mark.parametrize("path", ["plain", TRITON])
def test_a_head_of_no_ids_is_refused(path):
    ids = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="no ids"):
        linear_logprob(torch.zeros(3, 4), torch.zeros(0, 4), ids, path=path)


@pytest.mark.parametrize("path", ["plain", TRITON])
def test_a_mask_may_be_one_flag_that_is_everywhere(path):
    """Strides of a mask are not those of its memory."""
    ids = torch.arange(3)
    some = (torch.arange(400) % 3 == 1)[::2]
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    for banned in (torch.zeros(1, dtype=torch.bool).expand(200), some):
        options = {"temperature": 1.0, "seed": ids, "position": 1, "path": path}
        strided = sample(logits, banned=banned, **options)
        assert torch.equal(strided[0], sample(logits, banned=banned.clone(), **options)[0])
        given = (logits[:, :8], logits.T[:, :1].expand(-1, 8) * torch.arange(8), ids)
        found = linear_logprob(*given, banned=banned, path=path)
        assert torch.equal(found, linear_logprob(*given, banned=banned.clone(), path=path))


@NATIVE
@pytest.mark.parametrize("bad", [-1, 50, 2**62, -(2**63)])
def test_an_id_that_is_no_column_is_refused(bad):
    ids = torch.tensor([3, bad, 4])
    with pytest.raises(ValueError, match="id"):
        token_logprob(torch.zeros(3, 50), ids, path="native")


# ---- attention -----------------------------------------------------------------------------------


def bank(entries, heads, tokens, dim, owner=None, length=None):
    return Bank(
        torch.ones(entries, heads, tokens, dim),
        torch.ones(entries, heads, tokens, dim),
        None if owner is None else torch.tensor(owner),
        None if length is None else torch.tensor(length),
    )


@pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE)])
@pytest.mark.parametrize(
    "banks",
    [
        [bank(2, 0, 5, 16)],
        [bank(2, 3, 5, 16)],
        [bank(2, 2, 5, 16), bank(2, 1, 5, 16)],
        [bank(2, 2, 5, 32)],
        [bank(3, 2, 5, 16)],
        [bank(2, 2, 5, 16)._replace(values=torch.ones(2, 2, 4, 16))],
        [Bank(torch.ones(16), torch.ones(16))],
        [bank(2, 2, 5, 16, owner=[0])],
        [bank(2, 2, 5, 16, length=[5])],
    ],
)
def test_banks_that_do_not_fit_are_refused(banks, path):
    with pytest.raises(ValueError, match="attention"):
        attention(torch.ones(2, 3, 4, 16), banks, scale=1.0, causal=False, path=path)


@NATIVE
@pytest.mark.parametrize("owner", [[0, 2], [-1, 0], [2**62, 0]])
def test_an_owner_beyond_its_bank_is_refused(owner):
    q = torch.ones(2, 3, 4, 16)
    with pytest.raises(ValueError, match="entry"):
        attention(q, [bank(2, 2, 5, 16, owner)], scale=1.0, causal=False, path="native")


@NATIVE
@pytest.mark.parametrize("length", [[-5, 2**62], [-(2**63), 2**63 - 1]])
def test_lengths_of_any_numbers_are_cut_to_the_bank(length):
    q = torch.ones(2, 3, 4, 16)
    bent, cut = (bank(2, 2, 5, 16, length=some) for some in (length, [0, 5]))
    for path in ("native", "plain"):
        found, wanted = (
            attention(q, [some], scale=1.0, causal=False, path=path) for some in (bent, cut)
        )
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@NATIVE
def test_the_registered_op_refuses_what_the_public_one_does():
    keys = [torch.ones(1, 1, 5, 16)]
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.vise_kernels.attention(
            torch.ones(9, 3, 4, 16), keys, keys, [None], [None], causal=False, scale=1.0
        )


@NATIVE
@pytest.mark.parametrize("empty", ["rows", "tokens", "heads", "dim", "bank"])
def test_attention_over_nothing_is_empty_or_zero(empty):
    sizes = {"rows": 2, "tokens": 3, "heads": 4, "dim": 16, "bank": 5} | {empty: 0}
    q = torch.ones(sizes["rows"], sizes["tokens"], sizes["heads"], sizes["dim"])
    banks = [bank(sizes["rows"], 2, sizes["bank"], sizes["dim"])]
    out, lse = attention(q, banks, scale=1.0, causal=True, path="native")
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert empty != "bank" or ((out == 0).all() and (lse == -torch.inf).all())


def decoding(heads=2, owner=((0, 1),), length=((5, 5),)):
    keys = [torch.ones(2, heads, 5, 16) for _ in owner]
    numbers = (torch.tensor(owner), torch.tensor(length))
    return Banks(keys, keys, *numbers, locate(keys, keys))


@pytest.mark.parametrize("path", ["plain", TRITON])
def test_decoding_refuses_banks_that_do_not_fit(path):
    q = torch.ones(2, 4, 16)
    two = decoding(owner=((0, 1), (0, 1)), length=((5, 5), (5, 5)))
    other_heads = Banks([two.keys[0], torch.ones(2, 1, 5, 16)], two.values, *two_numbers(two))
    other_heads.values = other_heads.keys
    narrow = decoding()
    narrow.table = narrow.table[:, :2]
    none = Banks([], [], torch.zeros(0, 2).long(), torch.zeros(0, 2).long(), torch.zeros(0, 3))
    for banks in (decoding(heads=0), other_heads, narrow, none):
        with pytest.raises(ValueError, match="decode_attention"):
            decode_attention(q, banks, scale=1.0, path=path)


def two_numbers(banks):
    return banks.owner, banks.length, banks.table


@pytest.mark.parametrize("path", ["plain", TRITON])
@pytest.mark.parametrize("owner", [2, -1, 2**40])
def test_decoding_refuses_an_owner_beyond_its_bank(owner, path):
    with pytest.raises(ValueError, match="owner"):
        decode_attention(torch.ones(2, 4, 16), decoding(owner=((0, owner),)), scale=1.0, path=path)


@pytest.mark.parametrize("path", ["plain", TRITON])
def test_decoding_cuts_lengths_to_the_bank(path):
    bent = decoding(length=((2**40, -7),))
    cut = decoding(length=((5, 0),))
    found, wanted = (
        decode_attention(torch.ones(2, 4, 16), banks, scale=1.0, path=path) for banks in (bent, cut)
    )
    assert torch.equal(found, wanted)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE), TRITON])
@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("cut", ["rows", "heads", "dim", "axis"])
def test_gradients_of_other_shapes_are_refused(cut, part, path):
    """Fewer rows, heads or numbers than the kernel reads."""
    qkv, turn, queries = turned("odd")
    parts = heads(qkv, turn, queries, path="plain")
    whole = getattr(parts, part)
    short = {"rows": whole[:-1], "heads": whole[:, 1:], "dim": whole[..., 1:], "axis": whole[0]}
    grads = parts._replace(**{part: short[cut]})
    with pytest.raises(ValueError, match="do not fit"):
        heads_backward(qkv, turn, grads, path=path)


@pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE), TRITON])
@pytest.mark.parametrize("queries", [-2, 3, 4, 2**40])
def test_heads_that_are_not_in_the_product_are_refused(queries, path):
    with pytest.raises(ValueError, match="do not fit"):
        heads(torch.ones(3, 8), small_turn(3), queries, path=path)


@pytest.mark.parametrize("path", ["plain", pytest.param("native", marks=NATIVE), TRITON])
def test_angles_and_products_of_other_shapes_are_refused(path):
    turn = small_turn(3)
    flat = turn._replace(cos=torch.ones(()), sin=torch.ones(()))
    bad = [
        (torch.ones(3, 8), turn._replace(cos=torch.ones(2, 1))),
        (torch.ones(3, 8), turn._replace(q_weight=torch.ones(1))),
        (torch.ones(3, 8), turn._replace(cos=torch.ones(3, 0), sin=torch.ones(3, 0))),
        (torch.ones(3, 8), flat),
        (torch.ones(8), turn),
        (torch.ones(()), turn),
    ]
    for qkv, angles in bad:
        with pytest.raises(ValueError, match="do not fit"):
            heads(qkv, angles, 2, path=path)


@NATIVE
def test_rows_of_gradients_that_are_missing_are_refused():
    x = torch.ones(5, 8)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm_backward(x, torch.ones(8), torch.ones(4, 8), 1e-6, path="native")
    with pytest.raises(ValueError, match="do not fit"):
        swiglu_backward(x, torch.ones(4, 4), path="native")


@NATIVE
@pytest.mark.parametrize(
    "operands",
    [
        (torch.ones(8), torch.ones(3, 8)),
        (torch.ones(4, 8), torch.ones(8)),
        (torch.ones(4, 8), torch.ones(3, 8), torch.ones(1)),
        (torch.ones(4, 8), torch.ones(3, 8), None, torch.ones(2), torch.ones(3, 2)),
        (torch.ones(4, 8), torch.ones(3, 8), None, torch.ones(4, 2), torch.ones(2)),
        (torch.ones(4, 8), torch.ones(3, 8), None, torch.ones(4, 2), None),
        (torch.ones(4, 8), torch.ones(3, 8), None, None, torch.ones(3, 2)),
    ],
)
def test_few_rows_of_other_shapes_are_refused(operands):
    with pytest.raises(ValueError, match="do not fit"):
        few_rows(*operands, path="native")


@NATIVE
def test_rotations_by_tables_of_other_shapes_are_refused():
    x = torch.ones(3, 2, 4)
    for rows, half in ((2, 2), (3, 1), (3, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            rotate(x, torch.ones(rows, half), torch.ones(rows, half), path="native")


FEW_THREADS = """
import resource
import torch
from vise_kernels.dispatch import native
images = [torch.full((3, 3, 3), n % 256, dtype=torch.uint8) for n in range(1000)]
outs = [torch.empty_like(image) for image in images]
matrices = torch.eye(3, dtype=torch.float64).repeat(1000, 1, 1)
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 2**26
resource.setrlimit(resource.RLIMIT_AS, (room, room))
native().warp(images, outs, matrices, 128.0, 1000)
assert all(torch.equal(*pair) for pair in zip(images, outs, strict=True))
"""


@NATIVE
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits")
def test_threads_that_the_system_does_not_give_are_done_without():
    """A thousand are asked for where a few stacks have room."""
    done = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_parts_of_a_product_may_be_none_of_queries():
    """No query heads is a size like others."""
    turn = small_turn(3)
    parts = heads(torch.ones(3, 4), turn, 0)
    assert parts.q.shape == (3, 0, 2) and parts.k.shape == (3, 1, 2)
    grads = Parts(parts.q, parts.k, parts.v)
    assert heads_backward(torch.ones(3, 4), turn, grads).shape == (3, 4)
