"""docs/SETTINGS.md against the code: every setting has a row, and what a command reads of the
configuration while it runs is what the table says acts there.
"""

import contextlib
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from vise_fast import infer, merge, train
from vise_fast.config import schema, settings
from vise_fast.config.schema import Config, Section
from vise_fast.engine.stock import StockEngine
from vise_fast.estimate import __main__ as estimate
from vise_fast.evaluate import __main__ as evaluate
from vise_fast.model import quantise
from vise_fast.system import console

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "evaluate", "infer", "merge", "estimate")
READS_A_WHOLE_STEP = ("train", "estimate")
SMALL = [
    "--train.batch=2",
    "--rollout.samples=2",
    "--rollout.views=2",
    "--eval.scenes=2",
    "--train.schedule=constant",
    "--train.warmup=0",
    "--train.steps=2",
    "--run.checkpoint_every=1",
]


def table():
    """{setting: {command: cell}}."""
    lines = (ROOT / "docs" / "SETTINGS.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    body = [row for row in rows if re.fullmatch(r"\w+\.\w+", row[0])]
    assert all(len(row) == 1 + len(COMMANDS) for row in body)
    return {row[0]: dict(zip(COMMANDS, row[1:], strict=True)) for row in body}


TABLE = table()
SECTIONS = {field.annotation.__name__: name for name, field in Config.model_fields.items()}


@contextlib.contextmanager
def recorded():
    """Yields the set of settings that are read meanwhile, but for those that validation reads."""
    read, original, validate = set(), Section.__getattribute__, Config.model_validate
    paused = []

    def get(self, name):
        section = SECTIONS.get(type(self).__name__)
        if section and not paused and name in type(self).model_fields:
            read.add(f"{section}.{name}")
        return original(self, name)

    def quietly(*args, **kwargs):
        paused.append(True)
        try:
            return validate(*args, **kwargs)
        finally:
            paused.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", get)
        patch.setattr(Config, "model_validate", quietly)
        yield read


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs on scenes and on photographs, and the photographs."""
    home = tmp_path_factory.mktemp("settings")
    (home / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (64 + 8 * i, 96, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(home / "photos" / f"{i}.png")
    (home / "labels.jsonl").write_text('{"image": "0.png", "name": "noise", "box": [9, 9, 50, 50]}')
    (home / "words.txt").write_text("red circle\n")
    return home


@pytest.fixture(scope="module")
def reads(place):
    """{command: settings it reads}, over runs that reach as much as a machine without a GPU can."""
    adapter = place / "scenes" / "adapter"
    photos = ["--data.dir", place / "photos"]
    labels = ["--eval.labels", place / "labels.jsonl", "--eval.label_images", place / "photos"]
    words = ["--data.queries", place / "words.txt", "--eval.absent", place / "words.txt"]
    affine = "--view.kinds=affine"
    runs = [
        ("train", train.main, [*SMALL, "--run.dir", place / "scenes"]),
        ("train", train.main, [*SMALL, "--run.dir", place / "pictures", *photos, *labels, *words]),
        ("evaluate", evaluate.main, ["--adapter", adapter, "--scenes", "2", affine]),
        ("evaluate", evaluate.main, ["--adapter", adapter, "--view.kinds=crop"]),
        ("evaluate", evaluate.main, ["--adapter", place / "pictures" / "adapter"]),
        ("infer", infer.main, ["--adapter", adapter, "--image", place / "photos" / "5.png"]),
        ("merge", merge.main, ["--adapter", adapter, "--out", place / "merged"]),
        ("estimate", estimate.main, [*photos, *labels]),
        ("estimate", estimate.main, ["--memory.budget_gb=4"]),
    ]
    found = {command: set() for command in COMMANDS}
    for command, main, words in runs:
        with recorded() as read:
            assert console.run(main, [str(word) for word in words]) == 0, (command, words)
        found[command] |= read
    return found


def test_every_setting_has_a_row():
    assert list(TABLE) == [key for key, _ in settings.fields(Config)]


def test_every_cell_says_one_of_three_things():
    cells = {cell.split(":")[0] for row in TABLE.values() for cell in row.values()}
    assert cells <= {"acts", "none", "refused"}


def test_the_tests_that_are_named_exist():
    named = {name for row in TABLE.values() for cell in row.values() for name in _named(cell)}
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named and all(f"def {name}(" in text for name in named)


def _named(cell):
    return re.findall(r"`(test_\w+)`", cell)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_acts_is_read_and_what_does_not_is_not(reads, command):
    acts = {key for key, row in TABLE.items() if row[command] == "acts"}
    assert sorted(acts - reads[command]) == [], f"never read by {command}"
    if command not in READS_A_WHOLE_STEP:
        none = {key for key, row in TABLE.items() if row[command] == "none"}
        assert sorted(none & reads[command]) == [], f"read by {command} after all"


@pytest.mark.parametrize("command", ["evaluate", "infer"])
def test_the_stock_engine_is_used_where_it_was_asked_for(reads, place, command, monkeypatch):
    encoded = []
    real = StockEngine.encode
    monkeypatch.setattr(
        StockEngine, "encode", lambda self, images: encoded.append(1) or real(self, images)
    )
    adapter = ["--adapter", str(place / "scenes" / "adapter")]
    words = {"evaluate": ["--scenes=1"], "infer": [f"--image={place / 'photos' / '0.png'}"]}
    main = {"evaluate": evaluate.main, "infer": infer.main}[command]
    assert console.run(main, [*adapter, *words[command], "--model.engine=stock"]) == 0
    assert encoded


@pytest.mark.parametrize("wanted", [True, False])
def test_double_quantisation_is_passed_on(wanted):
    words = ["--model.quant=nf4", f"--model.double_quant={str(wanted).lower()}"]
    made = quantise.settings(schema.load(None, words), torch.float32)
    assert made.bnb_4bit_use_double_quant is wanted
