"""The tasks of a table: the eight rows of the paper (arXiv 2606.27373, Qwen3-VL-2B), and the drawn
ones that need no download.

Where lmms-eval scores sample by sample, a difference has a paired interval; CIDEr is a figure of a
whole corpus, and is told without one.
"""

from __future__ import annotations

from dataclasses import dataclass

from vise_fast.table import drawn


@dataclass(frozen=True)
class Row:
    """A line of the table. `task`: lmms-eval's name; `figure`: its metric; `better`: 1 higher, -1
    lower, 0 neither; `paper`: (base, adapter) as published.
    """

    title: str
    task: str
    figure: str
    better: int = 1
    paper: tuple[float, float] | None = None
    caption: bool = False


@dataclass(frozen=True)
class Needs:
    """What a task asks of a machine. gigabytes: of pictures; java: for the
    tokenizer of caption figures; questions: of the whole task.
    """

    gigabytes: float
    questions: int
    java: bool = False


PAPER = (
    Row("COCO captions, CIDEr", "coco2017_cap_val", "coco_CIDEr", 1, (21.54, 38.39), True),
    Row("NoCaps, CIDEr", "nocaps_val", "nocaps_CIDEr", 1, (19.52, 34.25), True),
    Row("Flickr30k, CIDEr", "flickr30k_test", "flickr_CIDEr", 1, (26.09, 42.64), True),
    Row("TextCaps, CIDEr", "textcaps_val", "textcaps_CIDEr", 1, (22.20, 41.86), True),
    Row("CHAIR-I", "coco_cap_chair", "coco_cap_chair_i", -1, (13.21, 8.21), True),
    Row("CHAIR-S", "coco_cap_chair", "coco_cap_chair_s", -1, (45.96, 40.51), True),
    Row("POPE accuracy", "pope", "pope_accuracy", 1, (89.01, 90.03)),
    Row("ScienceQA", "scienceqa", "exact_match", 1, (79.42, 83.61)),
)
NEEDS = {
    "coco2017_cap_val": Needs(0.8, 5_000, java=True),
    "nocaps_val": Needs(1.4, 4_500, java=True),
    "flickr30k_test": Needs(4.4, 31_783, java=True),
    "textcaps_val": Needs(0.9, 3_166, java=True),
    "coco_cap_chair": Needs(0.1, 500),
    "pope": Needs(1.5, 9_000),
    "scienceqa": Needs(0.5, 4_241),
}
"""Rough sizes to plan with; not measured."""
DRAWN = (
    Row("captions that name what is there", "drawn_captions", "names_present", caption=True),
    Row("yes or no, accuracy", "drawn_yes_no", "accuracy"),
    Row("yes or no, share of yes", "drawn_yes_no", "yes_ratio", 0),
    Row("boxes, mean IoU", "drawn_boxes", "iou"),
    Row("boxes, IoU of half or more", "drawn_boxes", "iou_50"),
    Row("blind (a grey image): yes or no", f"drawn_yes_no{drawn.BLIND}", "accuracy", 0),
    Row("blind (a grey image): mean IoU", f"drawn_boxes{drawn.BLIND}", "iou", 0),
)
SETS = {"paper": PAPER, "drawn": DRAWN}


def chosen(words: str) -> tuple[Row, ...]:
    """The rows of a set, or those of the named tasks. Raises KeyError for a task of no set."""
    if words in SETS:
        return SETS[words]
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    known = {row.task for rows in SETS.values() for row in rows}
    for task in wanted:
        if task not in known:
            raise KeyError(task)
    return tuple(row for rows in SETS.values() for row in rows if row.task in wanted)


def tasks(rows: tuple[Row, ...]) -> list[str]:
    """The tasks of these rows, each once."""
    return list(dict.fromkeys(row.task for row in rows))
