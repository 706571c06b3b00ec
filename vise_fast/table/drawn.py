"""The shipped task set in lmms-eval's own format: drawn scenes, asked for a caption, for yes or no,
and for boxes.

It needs no download, so that the whole way from a model directory to a table of two arms runs on
any machine; its truth is that of images/scenes.py. Scenes are named by their number alone: two
machines draw the same ones, and none of them is one of training. Left out: running it (lmms_eval.py
does) and how an answer is scored (drawn_scoring.py, which lmms-eval imports).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image

from vise_fast.images import scenes
from vise_fast.images.scenes import Scene
from vise_fast.system.randomness import generator
from vise_fast.text.prompts import Style

SEED = 77_003
SIDE = 128
BLIND = "_blind"
"""What the name of a task about grey pictures ends in."""
SCORING = Path(__file__).parent / "drawn_scoring.py"
TASK = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function {scoring}.doc_to_visual
doc_to_text: !function {scoring}.doc_to_text
doc_to_target: answer
process_results: !function {scoring}.{score}
generation_kwargs:
  max_new_tokens: 64
  temperature: 0
  do_sample: false
metric_list:
{metrics}
metadata:
  - version: 1.0
"""
METRIC = """  - metric: {name}
    aggregation: mean
    higher_is_better: true
"""


class Task(NamedTuple):
    """A task: its name, the function that scores a sample, and the figures that one yields; the
    first is the one to report.
    """

    name: str
    score: str
    figures: tuple[str, ...]


TASKS = (
    Task("drawn_captions", "score_caption", ("names_present", "words")),
    Task("drawn_yes_no", "score_yes_no", ("accuracy", "yes_ratio")),
    Task("drawn_boxes", "score_box", ("iou", "iou_50", "readable")),
)


def write(directory: Path, style: Style, count: int) -> None:
    """The tasks over `count` scenes, with questions in the words of `style`, and each again about a
    grey picture: what is answered right there is guessed. Raises OSError.
    """
    pictures = directory / "pictures"
    pictures.mkdir(parents=True)
    drawn = [scenes.draw(generator(SEED, index, "table"), size=SIDE) for index in range(count)]
    for index, scene in enumerate(drawn):
        PIL.Image.fromarray(scene.pixels).save(pictures / f"{index}.png")
    grey = pictures / "grey.png"
    PIL.Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(grey)
    shutil.copyfile(SCORING, directory / SCORING.name)
    for task in TASKS:
        rows = list(_questions(task, drawn, style))
        seen = [row | {"image": str((pictures / f"{row['scene']}.png").resolve())} for row in rows]
        _write(directory, task.name, task, seen)
        _write(
            directory, task.name + BLIND, task, [r | {"image": str(grey.resolve())} for r in rows]
        )


def scene_of(directory: Path, task: str) -> list[int]:
    """The scene that each question of a task is about, in their order. Raises OSError."""
    lines = (directory / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["scene"] for line in lines]


def _questions(task: Task, drawn: list[Scene], style: Style) -> Iterator[dict[str, Any]]:
    """Of a task about all scenes, each with the number of its scene."""
    ask = {"drawn_captions": _captions, "drawn_yes_no": _verdicts, "drawn_boxes": _boxes}
    for index, scene in enumerate(drawn):
        for row in ask[task.name](scene, index, style):
            yield row | {"scene": index}


def _write(directory: Path, name: str, task: Task, rows: list[dict[str, Any]]) -> None:
    questions = directory / f"{name}.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = _yaml(name, task, questions)
    (directory / f"{name}.yaml").write_text(text, encoding="utf-8")


def _yaml(name: str, task: Task, questions: Path) -> str:
    metrics = "".join(METRIC.format(name=name) for name in task.figures).rstrip()
    place = json.dumps(str(questions.resolve()))
    return TASK.format(
        task=name,
        questions=place,
        scoring=SCORING.stem,
        score=task.score,
        metrics=metrics,
    )


def _captions(scene: Scene, index: int, style: Style) -> Iterator[dict[str, Any]]:
    yield {"question": style.ask(), "answer": "", "names": scene.names}


def _verdicts(scene: Scene, index: int, style: Style) -> Iterator[dict[str, Any]]:
    """One object that is there, one name that is not."""
    rng = generator(SEED, index, "table absent")
    absent = scenes.absent_name(rng, scene.names)
    for name, answer in ((scene.names[0], "yes"), (absent, "no")):
        yield {"question": style.verify(name), "answer": answer}


def _boxes(scene: Scene, index: int, style: Style) -> Iterator[dict[str, Any]]:
    for thing in scene.objects:
        if scene.names.count(thing.name) == 1:
            yield {"question": style.ground(thing.name), "answer": "", "box": list(thing.box_1000)}
