"""An embedding in 8 bits a number: what it returns, what it holds, and a model that has one."""

import copy

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of, relative, stock_inputs
from tiny import build, images
from torch import nn

from vise_fast.model.eight_bit_rows import EightBitRows, replace_embedding
from vise_fast.system.errors import ConfigError


def table(rows, width, dtype=torch.float32):
    torch.manual_seed(0)
    made = nn.Embedding(rows, width).to(dtype).requires_grad_(False)
    made.weight[rows // 2] = 0
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 33), (8193, 5)])
def test_a_row_is_within_half_a_step_of_what_it_was(rows, width, dtype):
    whole = table(rows, width, dtype)
    held = EightBitRows(whole)
    ids = torch.arange(rows).view(1, rows, 1)
    found = held(ids)
    assert found.shape == (1, rows, 1, width) and found.dtype == dtype
    rows_of = whole.weight.double()
    step = rows_of.abs().amax(1, keepdim=True) / 127
    off = (found.view(rows, width).double() - rows_of).abs()
    assert (off <= 0.5 * step + torch.finfo(dtype).eps * rows_of.abs()).all()
    assert found[0, rows // 2].abs().max() == 0


def test_it_holds_a_byte_a_number_and_has_no_parameters():
    held = EightBitRows(table(300, 64, torch.bfloat16))
    size = sum(buffer.numel() * buffer.element_size() for buffer in held.buffers())
    assert size == 300 * (64 + 4) and not list(held.parameters())
    assert held.num_embeddings == 300 and held.embedding_dim == 64


def test_a_model_sees_the_rounded_rows():
    """As the stock model whose table holds them whole."""
    model, engine = engine_of("mha_untied")
    replace_embedding(model.get_base_model(), "tiny")
    pictures = images(SIZES)
    found = engine.verdict_logits(engine.encode(pictures), ROWS, True)
    stock = build("mha_untied")
    rows = stock.get_input_embeddings()
    with torch.no_grad():
        rows.weight.copy_(EightBitRows(copy.deepcopy(rows))(torch.arange(len(rows.weight))))
        for n, row in enumerate(ROWS):
            wanted = stock(**stock_inputs(engine, pictures[n], row)).logits[0, -1]
            assert relative(found[n], wanted) < 1e-4
    plain = build("mha_untied")
    with torch.no_grad():
        other = plain(**stock_inputs(engine, pictures[0], ROWS[0])).logits[0, -1]
    assert relative(found[0], other) > 1e-4, "the rounding can be seen"


def test_a_head_that_is_the_same_table_is_refused():
    with pytest.raises(ConfigError, match="its embedding is its head as well"):
        replace_embedding(build("gqa2", adapters=False), "tiny")
