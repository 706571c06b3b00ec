"""Every family through the generic engine, on tiny random models: LoRA where the row says, the same
numbers as transformers' own passes row by row, and as little work as the engine promises.

The truth is `stock.StockEngine`, which takes every row alone from its pixels on, and transformers'
own `generate`. Tolerances: 2e-6 relative for states, 1e-5 for gradients; docs/BACKBONES.md has what
was reached.
"""

import re

import pytest
import torch
from small_engines import ROWS, SIZES, leaves, relative, worst
from tiny import IMAGE, TinyTokens, images
from tiny_families import CONFIGS, build

from vise_fast.engine.attention_meter import image_share
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.generic import GenericEngine
from vise_fast.engine.rollout import Answered
from vise_fast.engine.stock import StockBackbone, StockEngine
from vise_fast.model.families import BLOCKS, FAMILIES
from vise_fast.model.load import check_targets
from vise_fast.model.qwen3_vl import Qwen3VL
from vise_fast.model.stock_modules import StockModules
from vise_fast.system.errors import ConfigError

ZOO = ["qwen3_vl", *CONFIGS]
OWNER = [0, 1, 2, 3]
FAN = [2, 1, 1, 2]
STATES = 2e-6
GRADIENTS = 1e-5
PROJECTOR = re.compile(r"merger|projector|projection")


@pytest.fixture(scope="module", params=ZOO)
def model(request):
    return build(request.param)


def generic(model):
    return GenericEngine(StockModules(model), TinyTokens())


def stock(model):
    return StockEngine(StockBackbone(model), TinyTokens())


def answered(engine, temperature=1.0, adapters=True, limit=6):
    prompts = engine.prompt(engine.prefill(engine.encode(images(SIZES)), adapters), OWNER, ROWS)
    return engine.generate(prompts, FAN, limit, list(range(6)), temperature)


def question_of(answers):
    return Answered(ROWS, answers, [0, 0, 1, 2, 3, 3])


def test_every_row_is_in_the_zoo():
    assert set(ZOO) == set(FAMILIES)


def test_lora_lies_on_language_and_projector_and_nowhere_in_the_tower(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == check_targets(model) and not [n for n in names if re.search(BLOCKS, n)]
    layers = [n for n in names if ".layers." in n]
    between = [n for n in names if n not in layers]
    assert between and all(PROJECTOR.search(name) for name in between)
    depth = model.get_base_model().config.get_text_config().num_hidden_layers
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in layers} == set(range(depth))


@pytest.mark.parametrize("adapters", [True, False])
def test_a_fork_is_the_whole_pass(model, adapters):
    engine = generic(model)
    features = engine.encode(images(SIZES))
    truth = stock(model).verdict_logits(stock(model).encode(images(SIZES)), ROWS, adapters)
    prefixes = engine.prefill(features, adapters)
    forked = engine.forked_verdict_logits(prefixes, [2, 0, 3, 1], [ROWS[i] for i in (2, 0, 3, 1)])
    assert relative(forked, truth[[2, 0, 3, 1]]) < STATES
    assert relative(engine.verdict_logits(features, ROWS, adapters), truth) < STATES
    some = prefixes.select([3, 1])
    assert relative(engine.forked_verdict_logits(some, [1], [ROWS[1]]), truth[[1]]) < STATES


def test_adapters_matter(model):
    engine = generic(model)
    features = engine.encode(images(SIZES))
    with_them = engine.verdict_logits(features, ROWS, True)
    assert relative(with_them, engine.verdict_logits(features, ROWS, False)) > 1e-2


@pytest.mark.parametrize("temperature, adapters", [(0.0, True), (1.0, True), (1.0, False)])
def test_ragged_batches_sample_what_rows_alone_do(model, temperature, adapters):
    a = answered(generic(model), temperature, adapters)
    b = answered(stock(model), temperature, adapters)
    assert a.rows() == b.rows() and a.lengths == b.lengths
    assert (a.logprob - b.logprob).abs().max() < 1e-4
    assert len(set(map(tuple, a.rows()))) > 2, "the fixture should sample different answers"


def test_greedy_is_transformers_generate(model):
    engine = generic(model)
    answers = answered(engine, 0.0).rows()
    modules = engine.backbone
    banned = torch.where(engine.banned)[0].tolist()
    firsts = [answers[i] for i in (0, 2, 3, 4)]
    for image, row, answer in zip(images(SIZES), ROWS, firsts, strict=True):
        pixels, grids = modules.pixels([image])
        ids = engine._prefix_ids(grids[0]) + row
        ids = torch.tensor([ids])
        inputs = modules.inputs(pixels, grids) | modules.marks(ids) | modules.crossing(ids, 2)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=banned,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert answer == out[0, ids.shape[1] :].tolist()


def test_scored_log_probs_are_the_sampled_ones(model):
    engine = generic(model)
    answers = answered(engine)
    with torch.no_grad():
        for recompute in (False, True):
            hidden = engine.score(
                engine.encode(images(SIZES)), question_of(answers), True, recompute=recompute
            )
            logits = engine.backbone.logits(hidden).masked_fill(engine.banned, -torch.inf)
            scored = logits.log_softmax(-1).gather(1, answers.packed()[:, None])[:, 0]
            assert (scored - answers.logprob[answers.mask().bool()]).abs().max() < 1e-5


@pytest.mark.parametrize("way", ["shared", "one_each", "recompute", "released"])
def test_every_gradient_is_stock_autograd_s(model, way):
    engine = generic(model)
    plain = stock(model)
    answers = answered(engine)
    question = question_of(answers)
    if way == "one_each":
        question = Answered(ROWS, answers.select([0, 2, 3, 4]), OWNER)
    found = []
    for each in (engine, plain):
        features = each.encode(images(SIZES))
        if way == "released":
            hidden = each.score_released(features, question, True).hidden
        else:
            hidden = each.score(features, question, True, recompute=way == "recompute")
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        gradients = torch.autograd.grad((hidden * weights).sum(), leaves(model))
        found.append((hidden.detach(), gradients))
    (ours, gradients), (truth, wanted) = found
    assert relative(ours, truth) < STATES
    assert worst(gradients, wanted) < GRADIENTS
    assert all(bool(g.any()) for g in gradients), "a LoRA tensor without a gradient"


def test_reference_scores_go_on_from_cached_prefixes(model):
    engine = generic(model)
    question = question_of(answered(engine))
    features = engine.encode(images(SIZES))
    with torch.no_grad():
        prefixes = engine.prefill(features, False)
        engine.counters.take()
        a = engine.score(features, question, False, prefixes=prefixes)
        assert engine.counters.take()["prefixes"] == 0
        assert relative(a, engine.score(features, question, False)) < STATES


def test_nothing_is_done_twice(model):
    """The tower runs once per image, whatever the adapters; the prefix once per adapter state."""
    engine = generic(model)
    tower = model.get_base_model().model.get_submodule(engine.backbone._kept.outputs[-1])
    inside = next(m for m in tower.modules() if isinstance(m, torch.nn.Linear))
    passes = []
    handle = inside.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    features = engine.encode(images(SIZES))
    for adapters in (True, False):
        prefixes = engine.prefill(features, adapters)
        prompts = engine.prompt(prefixes, OWNER, ROWS)
        engine.generate(prompts, FAN, 4, list(range(6)), 1.0)
        engine.forked_verdict_logits(prefixes, OWNER, ROWS)
    handle.remove()
    counted = engine.counters.take()
    assert len(passes) == 1
    assert counted["images_encoded"] == 4 and counted["prefixes"] == 8
    assert counted["verdicts"] == 8 and counted["forwards"] == 2 + 4 + counted["decode_steps"]


def test_the_attention_on_the_image_is_a_share(model):
    """Against the fast engine's own meter on Qwen3-VL; elsewhere within 0..1, all of it where every
    key is the image's.
    """
    engine = generic(model)
    answers = answered(engine, limit=4).select([0, 2, 3, 4])
    prefixes = engine.prefill(engine.encode(images(SIZES)), True)
    if engine.backbone.row.crosses:
        assert not engine.measures_attention
        with pytest.raises(TypeError):
            image_share(engine, prefixes, OWNER, ROWS, answers)
        return
    share = image_share(engine, prefixes, OWNER, ROWS, answers)
    depth = model.get_base_model().config.get_text_config().num_hidden_layers
    assert share.shape == (depth, 4) and bool(((share > 0) & (share < 1)).all())
    if engine.backbone.row.fast:
        fast = FastEngine(Qwen3VL(model), TinyTokens())
        held = fast.prefill(fast.encode(images(SIZES)), True)
        assert relative(share, image_share(fast, held, OWNER, ROWS, answers)) < 1e-5
    else:
        engine.tokens.head, before = [2, 3, 4], engine.tokens.head
        assert not torch.equal(share, image_share(engine, prefixes, OWNER, ROWS, answers))
        engine.tokens.head = before


def test_three_engines_agree_on_qwen3_vl():
    model = build("qwen3_vl")
    engines = [FastEngine(Qwen3VL(model), TinyTokens()), generic(model), stock(model)]
    rolled = [answered(engine) for engine in engines]
    assert rolled[0].rows() == rolled[1].rows() == rolled[2].rows()
    states = []
    for engine in engines:
        states.append(engine.score(engine.encode(images(SIZES)), question_of(rolled[0]), True))
    assert relative(states[1], states[0]) < 1e-5 and relative(states[2], states[1]) < STATES


def test_padding_in_a_sliding_window_is_refused():
    engine = generic(build("gemma3"))
    features = engine.encode(images(SIZES))
    rows = [[10] * 195, [11], [12], [13]]
    with pytest.raises(ConfigError, match="sliding window of 192"):
        engine.verdict_logits(features, rows, True)


def test_the_stock_forward_is_as_it_was_afterwards(model):
    engine = generic(model)
    answered(engine)
    loose = [name for name, m in model.named_modules() if "forward" in vars(m)]
    assert not loose and not any(m.training for m in model.modules())
    assert engine.backbone.image_token == IMAGE
