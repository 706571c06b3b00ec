"""The attention meter against the attention weights that transformers' eager forward writes out."""

import pytest
import torch
from small_engines import ROWS, SIZES, engine_of, sampled, stock_inputs, switched
from tiny import SHAPES, images

from vise_fast.engine.attention_meter import image_map, image_share, log_sum_exp
from vise_fast.engine.rollout import Rollout, owners
from vise_fast.model.tree import Grid, Part


def eager_share(model, engine, picture, question, answer):
    """(layers,): weights on image tokens, mean over heads and the queries that predict the answer's
    tokens.
    """
    model.get_base_model().set_attn_implementation("eager")
    inputs = stock_inputs(engine, picture, question + answer[:-1])
    weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    image = inputs["input_ids"][0] == engine.tokens.image_token
    return torch.stack([w[0, :, -len(answer) :][..., image].sum(-1).mean() for w in weights])


def measured(engine, pictures, answers, owner, questions, adapters):
    prefixes = engine.prefill(engine.encode(pictures), adapters)
    return image_share(engine, prefixes, owner, questions, answers)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", [True, False])
@torch.no_grad()
def test_share_equals_eager_weights(shape, adapters):
    model, engine = engine_of(shape)
    pictures = images(SIZES)
    _, answers = sampled(engine, pictures, fan=2)
    owner = owners([2] * 4)
    questions = [ROWS[i] for i in owner]
    assert len(set(answers.lengths)) > 1, "the fixture should mix lengths"
    share = measured(engine, pictures, answers, owner, questions, adapters)
    for n, (i, answer) in enumerate(zip(owner, answers.rows(), strict=True)):
        with switched(model, adapters):
            truth = eager_share(model, engine, pictures[i], ROWS[i], answer)
        words = f"row {n}: {share[:, n].tolist()} against {truth.tolist()}"
        assert (share[:, n] - truth).abs().max() < 1e-5, words


@torch.no_grad()
def test_rows_in_any_order_several_questions_about_one_image():
    _, engine = engine_of("gqa2")
    pictures = images(SIZES[:3])
    owner = [2, 0, 2, 1, 0]
    ids = torch.tensor([[9, 8, 1], [7, 1, 0], [1, 0, 0], [12, 13, 14], [20, 1, 0]])
    answers = Rollout(ids, torch.zeros(5, 3), [3, 2, 1, 3, 2])
    questions = [[10], [11, 12], [13, 14, 15], [16], [17, 18]]
    together = measured(engine, pictures, answers, owner, questions, True)
    for n in range(5):
        alone = measured(engine, pictures, answers.select([n]), [owner[n]], [questions[n]], True)
        assert (together[:, n] - alone[:, 0]).abs().max() < 1e-5


@torch.no_grad()
def test_share_depends_on_the_adapters_and_lies_between_zero_and_one():
    _, engine = engine_of("mha_untied")
    pictures = images(SIZES)
    _, answers = sampled(engine, pictures, fan=1)
    on = measured(engine, pictures, answers, [0, 1, 2, 3], ROWS, True)
    off = measured(engine, pictures, answers, [0, 1, 2, 3], ROWS, False)
    assert on.shape == (3, 4) and ((on > 0) & (on < 1)).all()
    assert (on - off).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_map_of_the_image_equals_eager_weights(shape):
    model, engine = engine_of(shape)
    pictures = images(SIZES)
    _, answers = sampled(engine, pictures, fan=1)
    for n, picture in enumerate(pictures):
        prefixes = engine.prefill(engine.encode([picture]), True)
        found = image_map(engine, prefixes, ROWS[n], answers.select([n]))
        answer = answers.rows()[n]
        model.get_base_model().set_attn_implementation("eager")
        inputs = stock_inputs(engine, picture, ROWS[n] + answer[:-1])
        image = inputs["input_ids"][0] == engine.tokens.image_token
        with switched(model, True):
            layers = model(**inputs, use_cache=False, output_attentions=True).attentions
        seen = torch.stack([w[0, :, -len(answer) :][..., image] for w in layers])
        truth = (seen / seen.sum(-1, keepdim=True)).mean((0, 1, 2))
        assert found.shape == truth.shape and (found - truth).abs().max() < 1e-5
        assert abs(float(found.sum()) - 1) < 1e-5


def test_log_sum_exp_of_a_shared_ragged_part():
    torch.manual_seed(0)
    owner = [1, 0, 1, 1]
    lengths = torch.tensor([5, 3])
    q = torch.randn(4, 2, 6, 8)
    keys = torch.randn(2, 3, 5, 8)
    found = log_sum_exp(q, Part(keys, keys, lengths, Grid(owner, 2)), 0.3)
    for n, entry in enumerate(owner):
        bank = keys[entry, :, : lengths[entry]].repeat_interleave(2, 0)
        truth = (torch.einsum("thd,hsd->ths", q[n], bank) * 0.3).logsumexp(-1)
        assert (found[n] - truth).abs().max() < 1e-5
