"""Memory predicted from shapes against memory counted around a real step; the counter itself; the
line through shallow models.
"""

import copy
import json

import benches
import pytest
import torch
from tiny_families import bare_of, gemma3, text
from transformers import AutoConfig

from vise_fast.config.schema import Config
from vise_fast.estimate.live_bytes import Live
from vise_fast.estimate.meta_model import Packed
from vise_fast.estimate.rehearsal import Case, counted, rehearse
from vise_fast.method.step_plan import Lengths

memory = benches.module("memory")
BOUND = 0.05
SAMPLED = [
    "nano-like, one slice an image",
    "G 16",
    "views too",
    "wide, int8",
    "wide, nf4, 8-bit Adam",
]
"""The bench does all sixteen."""


@pytest.mark.parametrize("name", SAMPLED)
def test_the_prediction_is_within_five_percent_of_the_count(name):
    row = memory.compare(name)
    assert abs(row["error"]) <= BOUND, f"{name}: {row['error']:+.1%} in {row['phase']}"


def test_words_that_must_come_back_are_predicted_too(monkeypatch):
    monkeypatch.setitem(memory.KEYS, "unique", "reward.unique")
    knobs = {"batch": 3, "samples": 2, "views": 1, "unique": True}
    monkeypatch.setitem(memory.CONFIGURATIONS, "unique", memory._setting("narrow", 128, **knobs))
    assert abs(memory.compare("unique")["error"]) <= BOUND


def test_naming_again_is_decoded_by_a_graph_of_its_own(shapes):
    """Greedily, where the first names are sampled: as much again is held on a GPU."""
    held = []
    for unique in (False, True):
        config = Config.model_validate({"train": {"batch": 2}, "reward": {"unique": unique}})
        phases = rehearse(config, shapes, [(64, 64)] * 2, torch.bfloat16).phases
        held.append({parts["graphed decoders"] for parts in phases.values()})
    (plain,), (again,) = held
    rows = 2
    text = shapes.text_config
    keys = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 2  # bf16
    logits = 4 * text.vocab_size
    assert again - plain == rows * (config.rollout.query_tokens * keys + logits)


def test_the_bench_covers_enough():
    assert len(memory.CONFIGURATIONS) >= 12
    assert {shape for shape, *_ in memory.CONFIGURATIONS.values()} == set(memory.MODELS)


def test_live_counts_storages_not_views_and_forgets_the_dead():
    with Live("cpu") as live:
        x = torch.zeros(1000)
        views = [x[i:] for i in range(5)]
        assert live.now == 4000
        y = x + 1
        del x
        assert live.now == 8000, "the views keep x alive"
        del views
        assert live.now == 4000
        del y
    assert live.now == 0 and live.peak == 8000


def test_live_counts_what_the_backward_pass_keeps():
    w = torch.ones(50, 50, requires_grad=True)
    with Live("cpu") as live:
        x = torch.ones(100, 50)
        y = (x @ w).exp()
        del x
        assert live.now == 100 * 50 * 4 * 2, "x is saved for w's gradient, y for its own"
        y.sum().backward()
        del y
    assert live.now == 50 * 50 * 4


def test_a_label_follows_its_tensor():
    with Live("cpu") as live:
        with live.labelled("weights"):
            x = torch.zeros(10)
        live.relabel([x], "masters")
        live.restart()
    assert +live.at_peak == {"masters": 40}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shape")
    (directory / "config.json").write_text(json.dumps(memory.shape_of("narrow")))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_line_through_two_shallow_models_meets_the_deep_one(shapes, checkpointing):
    config = Config()
    config.train.batch = 2
    config.train.checkpointing = checkpointing
    sizes = [(64, 96)] * 2
    line = rehearse(config, shapes, sizes, torch.float32, device="cpu")
    whole = counted(Case(config, sizes, torch.float32, Lengths(), "cpu"), shapes).phases
    assert line.phases.keys() == whole.keys()
    totals = {phase: sum(parts.values()) for phase, parts in whole.items()}
    for phase, total in totals.items():
        assert sum(line.phases[phase].values()) == pytest.approx(total, rel=1e-2), phase
    assert line.peak == pytest.approx(max(totals.values()), rel=1e-3)


@pytest.mark.parametrize("layers", [8, 9, 10])
def test_a_last_round_that_is_cut_short_counts(layers):
    """Rounds of two kinds of layers; nine are four and a half of them."""
    model_config = gemma3()
    kinds = ["sliding_attention", "full_attention"] * 5
    words = text(layers, head_dim=8, layer_types=kinds[:layers], sliding_window=96)
    model_config.text_config = type(model_config.text_config)(**words)
    config = Config.model_validate({"model": {"engine": "generic"}, "train": {"batch": 2}})
    planned = rehearse(config, model_config, [(32, 32)] * 2, torch.float32, device="cpu").phases
    held = sum(p.numel() * 4 for p in bare_of(model_config).parameters())
    for phase, parts in planned.items():
        assert 0 <= parts["weights"] - held < 4096, phase  # and the buffers of rope


def peak(shapes, **changes):
    config = Config()
    config.train.batch = 4
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return rehearse(config, shapes, [(64, 64)] * 4, torch.float32, Lengths(), "cpu").peak


def test_every_knob_of_the_planner_saves_memory(shapes):
    deep = copy.deepcopy(shapes)
    deep.text_config.num_hidden_layers = 20
    base = peak(deep)
    peaks = {
        "micro-batch": peak(deep, train__micro_batch=1),
        "int8": peak(deep, model__quant="int8"),
        "nf4": peak(deep, model__quant="nf4"),
        "checkpointing": peak(deep, train__checkpointing=True),
    }
    assert max(peaks.values()) < base, (peaks, base)
    assert peaks["nf4"] < peaks["int8"]


def test_an_embedding_in_8_bits_is_a_byte_a_number_and_a_scale_a_row(shapes):
    apart = copy.deepcopy(shapes)
    apart.tie_word_embeddings = False
    apart.text_config.tie_word_embeddings = False
    rows, width = apart.text_config.vocab_size, apart.text_config.hidden_size
    saved = peak(apart) - peak(apart, model__int8_embedding=True)
    assert saved == rows * (3 * width - 4)


@pytest.mark.parametrize("rows", [3, 200])
def test_llm_int8_holds_rows_not_weights(rows):
    """A product at threshold 0 reads the weights into fp32; above, it copies its rows to 8 bits, by
    way of 16, with a scale each.
    """
    peaks = {}
    for threshold in (0.0, 6.0):
        config = Config()
        config.model.quant = "int8"
        config.model.int8_threshold = threshold
        packed = Packed(torch.nn.Linear(48, 80, bias=False, device="meta"), config, "cpu")
        x = torch.empty(rows, 48, device="meta")
        with Live("meta") as live:
            packed.product(x)
        peaks[threshold] = live.peak
    out = 4 * rows * 80
    assert peaks[0.0] == out + 4 * 48 * 80
    assert peaks[6.0] == max(out + rows * 52, rows * (2 * 48 + 52))
