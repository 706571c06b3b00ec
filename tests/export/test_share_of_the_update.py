"""The update as factors: sizes, weights, averages and cuts against the products written out."""

import pytest
import stored
import torch
from peft import LoraConfig

from vise_fast.export.update import DOWN, PREFIX, PROJECTOR, UP, Update, average
from vise_fast.model.qwen3_vl import LANGUAGE_TARGETS
from vise_fast.system.errors import ConfigError, NumericFault


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return stored.adapter(tmp_path_factory.mktemp("update") / "adapter")


@pytest.fixture
def update(directory):
    return Update.read(directory)


def products(update):
    """What is added to each weight, written out."""
    t = update.tensors
    return {m: t[m + UP] @ t[m + DOWN] * update.scaling(m) for m in update.modules()}


def other(update, seed=1):
    """Another update of the same layers, of another rank."""
    rank = 3
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in update.modules():
        down = update.tensors[module + DOWN]
        up = update.tensors[module + UP]
        tensors[module + DOWN] = torch.randn(rank, down.shape[1], generator=draw)
        tensors[module + UP] = torch.randn(up.shape[0], rank, generator=draw)
    settings = LoraConfig(r=rank, lora_alpha=5, target_modules=update.settings.target_modules)
    return Update(settings, tensors)


def test_sizes_without_the_products(update):
    for module, product in products(update).items():
        assert update.squared_size(module) == pytest.approx(float(product.square().sum()), rel=1e-4)


def test_the_share_of_the_projectors(update):
    sizes = {module: float(p.square().sum()) for module, p in products(update).items()}
    outside = sum(size for module, size in sizes.items() if ".visual." in module)
    share = update.projector_share()
    assert share == pytest.approx(outside / sum(sizes.values()), rel=1e-4)
    assert 0 < share < 1 and update.language_only().projector_share() == 0
    assert update.weighed(0).projector_share() == 0


def test_the_language_model_alone_is_what_a_run_without_projectors_trains(update, tmp_path):
    kept = update.language_only()
    assert kept.settings.target_modules == LANGUAGE_TARGETS
    assert kept.keys == {name for name in update.keys if not PROJECTOR.search(name)}
    trained = stored.adapter(tmp_path / "adapter", "--lora.projector=false")
    assert Update.read(trained).keys == kept.keys


def test_layers_that_no_pattern_names_are_named_one_by_one(update):
    few = {n: t for n, t in update.tensors.items() if "q_proj" in n or PROJECTOR.search(n)}
    kept = Update(update.settings, few).language_only()
    assert kept.settings.target_modules == {m.removeprefix(PREFIX) for m in kept.modules()}


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, -1.0])
def test_alpha_scales_what_is_added(update, alpha):
    before, after = products(update), products(update.weighed(alpha))
    for module, product in before.items():
        torch.testing.assert_close(after[module], alpha * product)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_average_is_that_of_what_is_added(update, rslora):
    second = other(update)
    second.settings.use_rslora = rslora
    second.settings.alpha_pattern = {"q_proj": 7}
    mean = average([update, second])
    assert mean.settings.r == 4 + 3
    one, two, both = (products(u) for u in (update, second, mean))
    for module, product in both.items():
        torch.testing.assert_close(product, (one[module] + two[module]) / 2, rtol=1e-4, atol=1e-6)


def test_other_layers_have_no_average(update):
    with pytest.raises(ConfigError, match="different layers"):
        average([update, update.language_only()])


@pytest.mark.parametrize("damage", ["half a layer", "another rank", "nothing"])
def test_what_is_no_lora_is_refused(update, tmp_path, damage):
    update.write(tmp_path, "x")
    first = update.modules()[0]

    def change(found):
        if damage == "nothing":
            found.clear()
        elif damage == "another rank":
            found[first + DOWN] = found[first + DOWN][:2]
        else:
            found.pop(first + UP)

    stored.edit_tensors(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(ConfigError, match="no plain LoRA"):
        Update.read(tmp_path)


def test_numbers_that_are_none_are_refused(update, tmp_path):
    update.tensors[update.modules()[0] + UP][0, 0] = float("nan")
    update.write(tmp_path, "x")
    with pytest.raises(NumericFault, match="not finite"):
        Update.read(tmp_path)


def test_what_is_written_is_read_back(update, tmp_path):
    update.write(tmp_path, "org/base")
    again = Update.read(tmp_path)
    assert again.keys == update.keys
    assert all(torch.equal(again.tensors[name], update.tensors[name]) for name in update.keys)
    assert again.settings.base_model_name_or_path == "org/base"
