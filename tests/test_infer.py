"""Asking about one image: the answers are the engine's own greedy ones, boxes come out in the
picture's pixels, faults are one line.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from vise_fast import infer
from vise_fast.config import schema as config
from vise_fast.engine.fast import FastEngine
from vise_fast.images import scenes
from vise_fast.method import roles
from vise_fast.method.roles import Question, Sampling
from vise_fast.model import load as model
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault
from vise_fast.system.randomness import generator


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.fromarray(scenes.draw(generator(5, 0, "infer test")).pixels).resize((320, 240)).save(path)
    return path


@pytest.fixture(scope="module")
def shipped():
    settings = config.load(None, ["--rollout.box_tokens=20"])
    return settings, model.load(settings)


def test_answers_are_those_of_the_roles(shipped, picture):
    settings, policy = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    _, pixels = infer.read_image(picture, settings)
    given = infer.answer(engine, pixels, settings, None, adapters=False)
    prefix = engine.prefill(engine.encode([pixels]), False)
    assert given.query == roles.ask(engine, prefix, [0], [7], Sampling(64, 0.0)).texts[0]
    found = roles.ground(engine, prefix, [Question(0, given.query, [3])], Sampling(20, 0.0))
    assert (given.box_1000 is None and not found.box_1000.any()) or torch.equal(
        given.box_1000, found.box_1000[0]
    )
    assert given.seen == pytest.approx(
        float(roles.verify_forked(engine, prefix, [0], [given.query])[0]), abs=1e-6
    )
    assert (given.gone is None) == (given.box_1000 is None)


def test_one_encode_and_one_prefix_serve_all_questions(shipped, picture):
    settings, policy = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    _, pixels = infer.read_image(picture, settings)
    given = infer.answer(engine, pixels, settings, "red circle", adapters=False)
    counted = engine.counters.take()
    ghosts = 0 if given.gone is None else 1
    assert (counted["images_encoded"], counted["prefixes"]) == (1 + ghosts, 1 + ghosts)
    assert given.query == "red circle" and given.query_written is None


def test_a_box_without_area_hides_nothing(shipped, picture, monkeypatch):
    settings, policy = shipped
    _, pixels = infer.read_image(picture, settings)
    monkeypatch.setattr(roles.prompts, "read_box", lambda text: (0.0, 0.0, 0.0, 0.0))
    given = infer.answer(
        FastEngine(policy.backbone, policy.tokens), pixels, settings, "red circle", adapters=False
    )
    assert given.box_1000 is None and given.gone is None


def test_image_is_brought_to_the_grid_and_kept_for_drawing(shipped, picture):
    opened, pixels = infer.read_image(picture, shipped[0])
    assert opened.size == (320, 240) and pixels.dtype == torch.uint8
    assert (
        pixels.shape[0] % 16 == 0
        and pixels.shape[1] % 16 == 0
        and pixels.shape[0] * pixels.shape[1] <= shipped[0].data.max_pixels
    )


def test_drawing_marks_the_box_in_the_pictures_own_pixels(tmp_path):
    infer.draw(
        Image.new("RGB", (200, 100)),
        torch.tensor([250.0, 500.0, 750.0, 900.0]),
        tmp_path / "drawn.png",
    )
    marked = np.argwhere(np.array(Image.open(tmp_path / "drawn.png")).any(-1))
    assert marked.min(0).tolist() == [50, 50] and marked.max(0).tolist() == [90, 150]


def test_the_command_prints_box_and_verdicts(picture, capsys):
    assert infer.main(["--image", str(picture), "--query", "blue square [bold]"]) == 0
    shown = capsys.readouterr().out
    assert "query    blue square [bold]" in shown, "no markup"
    assert "visible  " in shown and ("of 320 x 240" in shown or "box      none" in shown)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n cut"])
def test_unusable_files_are_data_errors(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError):
        infer.main(["--image", str(tmp_path / "x.png")])


def test_missing_files_are_data_errors(tmp_path):
    with pytest.raises(DataError):
        infer.main(["--image", str(tmp_path / "none.png")])


@pytest.mark.parametrize("name", ["no/such/dir.png", "drawn.xyz"])
def test_drawing_where_nothing_can_be_written(tmp_path, name):
    with pytest.raises(EnvironmentFault):
        infer.draw(
            Image.new("RGB", (20, 20)), torch.tensor([0.0, 0.0, 500.0, 500.0]), tmp_path / name
        )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--image"],
        ["--img", "x"],
        ["--image", "x", "--adapter", "nowhere", "--train.stps", "1"],
    ],
)
def test_wrong_words_are_config_errors(words):
    with pytest.raises(ConfigError):
        infer.main(words)
