"""How the drawn tasks are asked and scored, in lmms-eval's words: it imports this file from beside
the tasks, in its own environment, so that nothing of vise_fast is imported here.

An answer is read as its tags say (`<box>`, `<visible>`, `<query>`); one that cannot be read is
wrong. Each sample scores by itself, so that base and adapter can be compared sample by sample.
"""

import re

from PIL import Image

NUMBER = re.compile(r"\d+(?:\.\d+)?")
VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
TAG = re.compile(r"<[^<>]*>")


def doc_to_visual(doc):
    """The picture of a question."""
    with Image.open(doc["image"]) as picture:
        return [picture.convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question, in the style that the model knows."""
    return doc["question"]


def read_box(text):
    """x1, y1, x2, y2 in thousandths; None where there are not four numbers."""
    numbers = [float(number) for number in NUMBER.findall(text)]
    return numbers if len(numbers) == 4 else None


def iou(one, two):
    """Overlap of two boxes; 0 for one without area."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return width * height / (sum(areas) - width * height)


def score_box(doc, results):
    """Overlap with the true box, and whether it is half or more."""
    box = read_box(results[0])
    overlap = iou(box, doc["box"]) if box else 0.0
    return {"iou": overlap, "iou_50": float(overlap >= 0.5), "readable": float(box is not None)}


def score_yes_no(doc, results):
    """Whether the verdict is right, and whether it is yes."""
    said = {word.lower() for word in VERDICT.findall(TAG.sub(" ", results[0]))}
    return {"accuracy": float(said == {doc["answer"]}), "yes_ratio": float(said == {"yes"})}


def score_caption(doc, results):
    """Whether something is named that is there; how long the caption is."""
    words = " ".join(TAG.sub(" ", results[0]).split()).lower()
    named = any(name in words for name in doc["names"])
    return {"names_present": float(named), "words": float(len(words.split()))}
