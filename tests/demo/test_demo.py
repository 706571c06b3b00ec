"""The demo: what it finds out of a picture, with the embedded model and without a page; and the
page itself, where gradio is installed.
"""

import sys

import pytest
import stored
import torch

from vise_fast.config import origin
from vise_fast.config.commands import syntax
from vise_fast.demo import __main__ as command
from vise_fast.demo import page, trial
from vise_fast.engine.choose import open_engine
from vise_fast.infer import answer
from vise_fast.model.load import load
from vise_fast.system import console


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    adapter = stored.adapter(tmp_path_factory.mktemp("demo") / "adapter")
    given = syntax("demo").parse(["--adapter", str(adapter), "--model", "nano"])
    config = origin.configuration(given)
    policy = load(config, str(adapter))
    return trial.Bench(policy, open_engine(policy, config, pytest.fail), config, adapter=True)


@pytest.fixture(scope="module")
def picture():
    return page.examples(128)[0]


def test_both_arms_look_for_the_same_and_the_base_is_the_base(bench, picture):
    base, adapter = trial.try_out(bench, picture)
    pixels = trial.on_grid(picture, bench.config)
    alone = answer(bench.engine, pixels, bench.config, None, adapters=False)
    assert base.said == trial.words(alone) and base.query == adapter.query == alone.query
    assert adapter.said != base.said  # the adapter was made to say something
    size = (pixels.shape[1], pixels.shape[0])
    for found in (base, adapter):
        pictures = [found.picture, found.ghost, found.heat, *found.views]
        assert len(found.views) == trial.VIEWS and {image.size for image in pictures} == {size}
        assert len({image.tobytes() for image in pictures}) == len(pictures)


def test_a_question_of_ones_own_and_the_strength(bench, picture):
    before = {name: p.detach().clone() for name, p in bench.policy.parameters().items()}
    base, none = trial.try_out(bench, picture, "red circle", alpha=0)
    assert base is none and "looks for: red circle" in base.said
    _, whole = trial.try_out(bench, picture, "red circle", alpha=1)
    _, most = trial.try_out(bench, picture, "red circle", alpha=2)
    assert len({base.said, whole.said, most.said}) == 3
    assert all(torch.equal(p, before[n]) for n, p in bench.policy.parameters().items())


def test_what_is_no_box_is_shown_without_one(bench, picture, monkeypatch):
    monkeypatch.setattr(trial, "answer", lambda *a: page_less(answer(*a)))
    base, _ = trial.try_out(bench, picture)
    assert base.ghost is None and base.views == [] and "no box (it wrote: " in base.said
    assert page.shown(base)[2] == []


def page_less(given):
    return type(given)(given.query, None, None, "nonsense", given.seen, None)


def test_without_gradio_it_says_what_to_install_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(command, "load", lambda *a, **k: pytest.fail("loaded"))
    assert console.run(command.main, []) == 4
    assert "pip install 'gradio>=5'" in capsys.readouterr().err


def test_the_page_answers_on_loopback(bench, picture, tmp_path):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    picture.save(tmp_path / "scene.png")
    blocks = page.build(bench)
    blocks.launch(server_name=command.HOST, prevent_thread_lock=True, quiet=True)
    try:
        assert blocks.local_url.startswith("http://127.0.0.1:")
        asked = client.Client(blocks.local_url, verbose=False)
        file = client.handle_file(str(tmp_path / "scene.png"))
        found = asked.predict(file, "red circle", 1.0, api_name="/look")
        assert len(found) == 8 and "looks for: red circle" in found[1] and "box" in found[5]
    finally:
        blocks.close()
