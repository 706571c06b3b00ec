"""Weights in 4 and 8 bits written out: the kernel equals its plain version and bitsandbytes' own to
the last bit, on shapes that end within a block.
"""

import pytest
import torch
from vise_kernels.unpack import Coarse, Nibbles, unpack_int8, unpack_nf4

SHAPES = [(1, 64), (3, 21), (5, 13), (37, 70), (96, 128), (2, 1100), (257, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


INTERPRETED = not torch.cuda.is_available()


def same(found, wanted):
    """To the last bit; Triton's interpreter cuts where a GPU rounds to bfloat16."""
    if found.dtype == torch.bfloat16 and INTERPRETED:
        return bool(((found - wanted).abs() <= wanted.abs() * 2**-7).all())
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


def held(shape, double):
    """Such a weight as bitsandbytes holds it, and the library's state."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    coarse = None
    if double:
        wide = state.state2
        coarse = Coarse(wide.code, wide.absmax, state.offset, wide.blocksize)
    return Nibbles(packed, state.code, state.absmax, state.blocksize, coarse), packed, state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_written_out_as_the_library_writes_it(shape, double, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, packed, state = held(shape, double)
    state.dtype = dtype
    wanted = functional.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(unpack_nf4(weight, shape, dtype, path="plain"), wanted)
    assert same(unpack_nf4(weight, shape, dtype, path="triton"), wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (4, 2500)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_written_out_with_one_rounding(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    peaks = torch.rand(shape[0], generator=generator) + 0.01
    truth = (weight.double() * (peaks / 127.0).double()[:, None]).to(torch.float32).to(dtype)
    assert torch.equal(unpack_int8(weight, peaks, dtype, path="plain"), truth)
    assert same(unpack_int8(weight, peaks, dtype, path="triton"), truth)


def test_a_wrong_scale_would_be_seen():
    weight, *_ = held((37, 70), True)
    moved = weight._replace(scales=weight.scales.roll(1))
    right = unpack_nf4(weight, (37, 70), torch.bfloat16, path="triton")
    assert not torch.equal(unpack_nf4(moved, (37, 70), torch.bfloat16, path="triton"), right)


def test_what_does_not_fit_is_refused():
    weight, *_ = held((4, 64), False)
    with pytest.raises(ValueError, match="128 bytes and 4 scales in blocks of 64"):
        unpack_nf4(weight, (4, 65), torch.float32)
    with pytest.raises(ValueError, match="3 scales"):
        unpack_nf4(weight._replace(scales=weight.scales[:3]), (4, 64), torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        unpack_int8(torch.zeros(3, 4, dtype=torch.int8), torch.ones(4), torch.float32)
