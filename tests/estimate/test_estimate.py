"""The planner: what it predicts for, what it chooses, what it says; the presets it writes."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from vise_fast import lowmem
from vise_fast.config import schema as configuration
from vise_fast.config.schema import Config
from vise_fast.estimate import planner as estimate
from vise_fast.estimate.planner import GIB, Planner, plan, usable
from vise_fast.model.load import known_shapes
from vise_fast.system import console
from vise_fast.system.errors import ConfigError, MemoryFloor

ROOT = Path(__file__).parents[2]


class Sizes:
    """A source of which only the sizes matter."""

    def __init__(self, *sizes):
        self._sizes = list(sizes)

    def sizes(self):
        return self._sizes


def nano(**budget):
    config = Config()
    config.train.batch = 4
    config.memory.budget_gb = budget.get("gb")
    return config


@pytest.fixture(scope="module")
def asked():
    return Planner(nano()).rehearse(nano())


def gb_for(bytes_):
    """The memory.budget_gb of which `bytes_` can be used."""
    return (bytes_ + estimate.CONTEXT) / (1 - estimate.FRAGMENTS) / GIB


def test_without_a_budget_nothing_is_changed(asked):
    found = plan(nano())
    assert found.changes == {} and found.fits and found.rehearsed.peak == asked.peak
    assert re.search(r"peak 0\.\d\d GiB predicted, in phase '[a-z: ]+': .*\d", str(found))
    held = str(found.dtype).removeprefix("torch.")
    assert f"weights in {held}; the adapter beside them in float32, unmerged" in str(found)


def test_a_budget_that_holds_the_run_changes_nothing(asked):
    assert plan(nano(gb=gb_for(asked.peak * 1.01))).changes == {}


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_small_budget_is_kept_to(asked, share):
    found = plan(nano(gb=gb_for(asked.peak * share)))
    assert found.changes and found.fits and found.rehearsed.peak <= share * asked.peak
    said = str(found)
    assert "chosen to fit" in said and all(f"--{key}" in said for key in found.changes)
    assert found.config.model_dump() != nano().model_dump()


def test_fewer_bits_come_before_fewer_pixels_and_speed_before_both(asked):
    changes = plan(nano(gb=gb_for(asked.peak * 0.7))).changes
    assert "model.quant" not in changes and "data.max_pixels" not in changes


def test_a_second_forward_pass_comes_before_checkpointing(asked):
    """Just too little room: what the rollout would have kept for the update is computed again."""
    words = ["--train.batch=4", "--rollout.samples=1", "--reward.preset=paper"]
    config = configuration.load(None, words)
    whole = plan(config).rehearsed.peak
    config.memory.budget_gb = gb_for(whole * 0.99)
    assert plan(config).changes == {"train.share_forward": False}


def test_nothing_fits_a_thimble():
    with pytest.raises(MemoryFloor, match=r"nano needs 0\.\d GiB at least.*take a smaller model"):
        plan(nano(gb=gb_for(2**20)))


def test_the_largest_images_of_the_folder_decide():
    config = nano()
    config.data.max_pixels = 256 * 256
    small = [(64, 64)] * 9
    large = [(256, 256)] * 4
    folders = (small, small + large, large)
    peaks = [Planner(config, Sizes(*sizes)).rehearse(config).peak for sizes in folders]
    assert peaks[0] < peaks[1] == peaks[2]


def test_the_pixel_budget_shrinks_them():
    config = nano()
    config.data.max_pixels = 128 * 128
    small = Planner(config, Sizes((512, 512))).rehearse(config).peak
    assert small == Planner(config, Sizes((128, 128))).rehearse(config).peak


def test_usable_leaves_room_for_what_torch_does_not_see():
    config = nano(gb=8.0)
    assert 6.5 * GIB < usable(config) < 8 * GIB
    assert usable(nano()) > GIB


def test_published_sizes_need_no_download():
    shapes = known_shapes("Qwen/Qwen3-VL-8B-Instruct")
    assert shapes.text_config.hidden_size == 4096 and shapes.text_config.num_hidden_layers == 36


def test_unknown_models_are_a_configuration_fault(tmp_path):
    config = Config()
    config.model.path = str(tmp_path)
    with pytest.raises(ConfigError):
        plan(config)


def test_the_command_prints_phases_and_components(capsys):
    assert console.run(estimate.main, ["--train.batch", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("peak of each phase", "update: backward", "verify: verdicts", "fits"):
        assert word in out, word


def test_a_folder_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--train.batch", "1", "--rollout.samples", "2", "--data.max_pixels", "65536"]
    assert console.run(estimate.main, [*words, "--data.dir", "photoss"]) == 0
    assert "warning: photoss is not here" in capsys.readouterr().err


@pytest.mark.parametrize("card", lowmem.CARDS)
def test_presets_on_disk_load_and_fit_their_card(card):
    """The committed files, rehearsed again: what they promise holds for today's code."""
    path = ROOT / "configs" / f"lowmem-{card}gb.yaml"
    config = configuration.load(path)
    config.memory.budget_gb = float(card)
    found = Planner(config, dtype=torch.bfloat16).rehearse(config)
    assert found.peak <= usable(config)
    promised = float(re.search(r"predicted: ([\d.]+) GiB", path.read_text())[1])
    assert found.peak / GIB == pytest.approx(promised, abs=0.25)
    assert yaml.safe_load(path.read_text())["model"]["path"].startswith("Qwen/Qwen3-VL-")


# ---- the search ----------------------------------------------------------------------------------


class Formula(Planner):
    """Peaks by a formula, and a note of every rehearsal that was made."""

    def __init__(self, config):
        self.config = config
        self.made = set()

    def rehearse(self, config):
        c = config
        weights = {"none": 16, "int8": 8, "nf4": 5}[c.model.quant]
        images = (c.train.micro_batch or c.train.batch) * c.data.max_pixels / 307_200
        layers = images * (1 if c.train.checkpointing else 4)
        shared = 0 if c.train.share_forward is False else images / 2
        moments = {"adamw": 4, "adamw8bit": 1, "paged_adamw8bit": 0}[c.optim.name]
        graphs = 0 if c.model.graphs is False else 0.5
        peak = weights + layers + shared + moments + graphs
        self.made.add(peak)
        return SimpleNamespace(peak=peak)

    def by_definition(self, budget):
        """Every base and all knobs, one after the other."""
        leanest = estimate._knobs(1, True, estimate.LEANEST) | {"model.graphs": False}
        for base in self._bases():
            if not self._fits(base | leanest, budget):
                continue
            micro = next(
                m
                for m in self._micro_batches()
                if m == 1 or self._fits(base | estimate._knobs(m, True, estimate.LEANEST), budget)
            )
            for knobs in self._speeds(micro):
                if self._fits(base | knobs, budget):
                    found = base | knobs
                    now = self.config
                    return {k: v for k, v in found.items() if v != estimate._get(now, k)}
        return None


@pytest.mark.parametrize("budget", [4, 6, 7, 9, 11, 14, 18, 21, 24, 30, 41, 60])
def test_the_search_finds_what_trying_everything_finds(budget):
    search = Formula(Config())
    assert search.choose(budget) == Formula(Config()).by_definition(budget)


def test_other_moments_are_not_rehearsed_where_the_leanest_do_not_fit():
    search, plain = Formula(Config()), Formula(Config())
    assert search.choose(33) == plain.by_definition(33) == {"train.checkpointing": True}
    assert (len(search.made), len(plain.made)) == (5, 8)
