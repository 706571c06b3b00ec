"""The evaluation: its figures against pupils whose every answer is known, and the real thing end to
end on the shipped model.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from vise_fast.config import schema as config
from vise_fast.engine.fast import FastEngine
from vise_fast.engine.rollout import owners
from vise_fast.evaluate import __main__ as command
from vise_fast.evaluate import held_out as evaluate
from vise_fast.evaluate.grounding import rescaled
from vise_fast.evaluate.objects import lookalike
from vise_fast.evaluate.table import side_by_side
from vise_fast.evaluate.titles import ENTRIES
from vise_fast.images import geometry
from vise_fast.images.albums.door import open_album
from vise_fast.images.drawn import Scenes
from vise_fast.images.photographs import Photographs
from vise_fast.method import roles
from vise_fast.method.rewards import LARGE_AREA
from vise_fast.model import load as model
from vise_fast.system import console, files, randomness
from vise_fast.system.errors import ConfigError


class Pupil:
    """Stands for engine and roles: images are their own features; `box` and `sees` answer with the
    scene's truth at hand.
    """

    device = torch.device("cpu")

    def __init__(self, source, box, sees, query=lambda scene: scene.names[0]):
        self.source = source
        self.box = box
        self.sees = sees
        self.query = query
        keys = [image.key for image in source.held_out(10_000)]
        keys += [
            randomness.key(source.eval.seed, 0, "validation scene", i) for i in range(len(keys))
        ]
        self.scenes = [source.scene(key) for key in keys]

    def encode(self, images):
        return list(images)

    def prefill(self, features, adapters):
        return features

    def scene_of(self, pixels):
        """The scene whose pixels these mostly are; None for a grey image and for views."""
        found = [
            scene
            for scene in self.scenes
            if (torch.from_numpy(scene.pixels) == pixels).float().mean() > 0.3
        ]
        return found[0] if found else None

    def ask(self, engine, prefixes, owner, seeds, sampling):
        texts = [self.query(self.scene_of(prefixes[i])) for i in owner]
        return roles.Queries(texts, [True] * len(texts), texts, [1] * len(texts))

    def ground(self, engine, prefixes, questions, sampling):
        rows = owners([len(question.seeds) for question in questions])
        asked = [questions[r] for r in rows]
        boxes = [self.box(self.scene_of(prefixes[q.image]), q.text) for q in asked]
        box = geometry.clean_1000(
            torch.tensor([b or (0.0,) * 4 for b in boxes], dtype=torch.float64)
        )
        return SimpleNamespace(
            box_1000=box, readable=torch.tensor([b is not None for b in boxes]), owner=rows
        )

    def verify(self, engine, features, queries, adapters):
        return torch.tensor(
            [
                float(self.sees(self.scene_of(pixels), query, pixels))
                for pixels, query in zip(features, queries, strict=True)
            ]
        )

    def verify_forked(self, engine, prefixes, owner, queries):
        return self.verify(engine, [prefixes[i] for i in owner], queries, True)


def true_box(scene, name):
    return (
        next((thing.box_1000 for thing in scene.objects if thing.name == name), None)
        if scene
        else (0.0, 0.0, 1000.0, 1000.0)
    )


def truly_sees(scene, name, pixels):
    """Yes where the object is there and at least half of its own pixels are untouched."""
    if scene is None or name not in scene.names:
        return False
    mine = scene.owner == scene.names.index(name)
    return (torch.from_numpy(scene.pixels)[mine] == pixels[mine]).all(-1).float().mean() > 0.5


@pytest.fixture
def settings():
    return config.load(
        None,
        [
            "--eval.scenes=12",
            "--eval.batch=5",
            "--eval.attention=false",
            "--eval.describe=0",
            "--ghost.method=mean",
        ],
    )


def examined(monkeypatch, settings, box=true_box, sees=truly_sees, **more):
    source = Scenes(settings)
    pupil = Pupil(source, box, sees, **more)
    for role in ("ask", "ground", "verify", "verify_forked"):
        monkeypatch.setattr(roles, role, getattr(pupil, role))
    return evaluate.held_out(pupil, source, settings, True)


def test_a_perfect_pupil_gets_full_marks(monkeypatch, settings):
    values = examined(monkeypatch, settings).values
    for label in ("greedy", "sampled"):
        full = {
            name: values[f"{label}_{name}"]
            for name in (
                "iou",
                "iou_50",
                "iou_rescaled",
                "centre_inside",
                "parse_rate",
                "area_ratio",
            )
        }
        assert full == dict.fromkeys(full, pytest.approx(1.0))
        assert (
            values[f"{label}_centre_error"] == pytest.approx(0.0, abs=1e-12)
            and values[f"{label}_scale"] == 1.0
        )
    for name in (
        "visible_present",
        "visible_absent",
        "visible_hidden",
        "visible_accuracy",
        "pope_accuracy",
        "pope_precision",
        "pope_recall",
        "pope_f1",
        "TU",
        "query_present",
    ):
        assert values[name] == pytest.approx(1.0), name
    assert values["visible_elsewhere"] == pytest.approx(1.0) and values["changed_elsewhere"] == 0
    assert (
        values["pope_yes_rate"] == pytest.approx(0.5)
        and values["SB"] == values["IG"] == values["ID"] == 0
    )
    assert values["own_TU"] == pytest.approx(1.0) and values["blind_yes_rate"] == 0


def test_a_pupil_who_always_answers_the_full_image_is_seen_through(monkeypatch, settings):
    found = examined(
        monkeypatch,
        settings,
        box=lambda scene, name: (0.0, 0.0, 1000.0, 1000.0),
        sees=lambda scene, name, pixels: True,
    )
    values = found.values
    source = Scenes(settings)
    things = []
    for image in source.held_out(12):
        things += source.scene(image.key).objects
    areas = geometry.area_share(torch.tensor([thing.box_1000 for thing in things])).numpy()
    assert values["greedy_iou"] == pytest.approx(areas.mean()), (
        "IoU with the full image is the area"
    )
    assert values["greedy_area_ratio"] == pytest.approx(1 / areas.mean())
    assert values["greedy_scale"] <= 0.6 and values["greedy_iou_rescaled"] < 0.3, (
        "shrinking helps a little, and is no grounding"
    )
    assert values["own_area_large"] == 1 and values["own_area"] == 1
    assert values["invariance"] > 0.9, "the collapse that invariance alone rewards"
    assert (
        values["pope_yes_rate"] == 1
        and values["pope_precision"] == pytest.approx(0.5)
        and values["pope_recall"] == 1
    )
    assert values["SB"] == 1 and values["own_SB"] == 1 and values["blind_yes_rate"] == 1
    assert LARGE_AREA < 1


def test_boxes_too_large_by_a_constant_are_made_good_by_the_rescale_and_by_nothing_else(
    monkeypatch, settings
):
    def grown(scene, name):
        box = true_box(scene, name)
        return None if box is None else tuple(rescaled(torch.tensor(box), 1.25).tolist())

    values = examined(monkeypatch, settings, box=grown).values
    assert values["greedy_scale"] == pytest.approx(0.8)
    assert (
        values["greedy_iou"] < 0.7 and values["greedy_iou_rescaled"] > 0.95
    )  # not 1: grown boxes are cut at the image's edge
    assert values["greedy_centre_inside"] == 1


def test_unreadable_answers_count_as_misses_and_have_no_area(monkeypatch, settings):
    values = examined(
        monkeypatch, settings, box=lambda scene, name: None, query=lambda scene: "purple giraffe"
    ).values
    assert (
        values["greedy_parse_rate"] == 0
        and values["greedy_iou"] == 0
        and values["greedy_centre_inside"] == 0
    )
    assert (
        "greedy_area" not in values
        and "greedy_centre_error" not in values
        and "invariance" not in values
    )
    assert values["query_present"] == 0 and values["distinct_queries"] == pytest.approx(1 / 12)


def test_only_clearly_visible_objects_are_asked_about(monkeypatch, settings):
    found = examined(monkeypatch, settings)
    source = Scenes(settings)
    things = [source.scene(image.key).objects for image in source.held_out(12)]
    visible = [np.array([thing.visible_share for thing in row]) >= 0.5 for row in things]
    assert found.marks["visible_present"][1].tolist() == [row.sum() for row in visible]
    assert found.marks["greedy_iou"][1].tolist() == [len(row) for row in things]


def test_lookalikes_are_absent_and_alike(settings):
    source = Scenes(settings)
    for image in source.held_out(12):
        scene = source.scene(image.key)
        for n, thing in enumerate(scene.objects):
            name = lookalike(np.random.default_rng(n), thing, scene)
            assert name not in scene.names and {thing.color, thing.shape} & set(name.split())


def test_every_measured_figure_has_a_title_and_titles_differ(monkeypatch, settings):
    values = examined(monkeypatch, settings).values
    assert set(values) <= set(ENTRIES), set(values) - set(ENTRIES)
    titles = [entry.title for entry in ENTRIES.values()]
    assert len(set(titles)) == len(titles)


# ---- the real thing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped model with a small non-zero adapter, and a handful of scenes."""
    settings = config.load(
        None,
        [
            "--eval.scenes=4",
            "--eval.batch=3",
            "--rollout.box_tokens=20",
            "--rollout.query_tokens=8",
            "--eval.samples=2",
        ],
    )
    policy = model.load(settings)
    torch.manual_seed(0)
    for name, parameter in policy.parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    policy.backbone.refresh()
    return settings, policy, Scenes(settings)


def test_arms_together_equal_arms_alone_whatever_the_batch(shipped):
    settings, policy, source = shipped
    base, adapter = evaluate.compare(FastEngine(policy.backbone, policy.tokens), source, settings)
    small = settings.model_copy(update={"eval": settings.eval.model_copy(update={"batch": 4})})
    for arm, together in ((False, base), (True, adapter)):
        alone = evaluate.held_out(FastEngine(policy.backbone, policy.tokens), source, small, arm)
        assert alone.values.keys() == together.values.keys()
        for name, value in together.values.items():
            assert alone.values[name] == pytest.approx(value, abs=1e-4), name
    assert base.layers != adapter.layers and base.n == adapter.n == 4
    assert len(base.layers) == policy.backbone.config.text_config.num_hidden_layers
    assert base.values["attention_share"] == pytest.approx(np.mean(base.layers), abs=1e-6)


def test_both_arms_share_every_encode_that_does_not_depend_on_the_arm(shipped):
    settings, policy, source = shipped
    engine = FastEngine(policy.backbone, policy.tokens)
    evaluate.held_out(engine, source, settings, False)
    alone = engine.counters.take()["images_encoded"]
    evaluate.compare(engine, source, settings)
    own = (
        settings.eval.scenes + 2
    )  # per arm: ghosts of its own boxes (at most one per image) and a grey image per batch
    assert engine.counters.take()["images_encoded"] <= alone + own < 2 * alone


def test_photographs_get_the_figures_that_need_no_labels(shipped, tmp_path):
    settings, policy, source = shipped
    for i in range(6):
        Pillow.fromarray(source.scene(1000 + i).pixels).resize((160, 96)).save(
            tmp_path / f"{i}.png"
        )
    photographs = config.load(
        None,
        [
            "--data.dir",
            str(tmp_path),
            "--data.holdout=0.5",
            "--eval.scenes=2",
            "--rollout.box_tokens=20",
            "--rollout.query_tokens=8",
        ],
    )
    album = open_album(str(tmp_path))
    folder = Photographs(album, photographs, model.grid_multiple("nano"), tmp_path / "bad.jsonl")
    found = evaluate.held_out(FastEngine(policy.backbone, policy.tokens), folder, photographs, True)
    assert found.n == 2 and {"attention_share", "own_parse_rate", "query_parse_rate"} <= set(
        found.values
    )
    assert not {
        name
        for name in found.values
        if name.startswith(("greedy", "sampled", "visible", "pope", "blind"))
    }


def test_no_held_out_images_is_an_empty_table(shipped):
    settings, policy, source = shipped
    none = config.load(None, ["--eval.scenes=0"])
    assert (
        evaluate.held_out(
            FastEngine(policy.backbone, policy.tokens), Scenes(none), none, True
        ).json()["values"]
        == {}
    )


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    assert (
        command.main(
            ["--scenes", "3", "--rollout.box_tokens", "20", "--json", str(tmp_path / "e.json")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "mean IoU, greedy" in printed and "3 held-out images: too few to tell" in printed
    content = json.loads((tmp_path / "e.json").read_text())
    assert set(content) == {"before"} and content["before"]["n"] == 3
    shown = side_by_side({"before": content["before"], "after": content["before"]})
    assert shown["mean IoU, greedy"][1].endswith("(+0.000, too few to tell)")
    assert side_by_side(content)["mean IoU, greedy"][1] == "-"


@pytest.mark.parametrize("place", ["nowhere/e.json", "folder", "file/e.json"])
def test_a_place_that_takes_no_json_is_said_before_a_model_is_loaded(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "load", None)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("as it was")
    assert console.run(command.main, ["--scenes", "3", "--json", str(tmp_path / place)]) == 4
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: cannot write {tmp_path / place}") and "give --json" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "as it was"


def test_looking_whether_a_place_takes_a_file_leaves_it_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        files.writable(tmp_path / name)
    assert (tmp_path / "old.json").read_text() == "old" and not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    "words",
    [["--scenes", "many"], ["--scnes", "3"], ["stray"], ["--json"], ["--adapter", "nowhere"]],
)
def test_wrong_words_are_config_errors(words):
    with pytest.raises(ConfigError):
        command.main(words)
