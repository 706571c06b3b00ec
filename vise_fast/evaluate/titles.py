"""What each figure of the evaluation is called, what it says, and which way is better; in the order
in which tables show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vise_fast.evaluate.results import Mark


@dataclass(frozen=True)
class Entry:
    """`better`: 1 higher, -1 lower, 0 neither (a figure to read, not to raise)."""

    title: str
    meaning: str
    better: int = 1


def _grounding(label: str, how: str) -> dict[str, Entry]:
    return {
        f"{label}_iou": Entry(f"mean IoU, {how}", "overlap of the answered box with the true one"),
        f"{label}_iou_50": Entry(
            f"IoU ≥ 0.5, {how}", "share of boxes that overlap the truth by half or more"
        ),
        f"{label}_iou_rescaled": Entry(
            f"mean IoU, {how}, best rescale",
            (
                "every box first scaled by the constant that suits this arm best on other images: "
                "a gain that survives is not one of size"
            ),
        ),
        f"{label}_centre_inside": Entry(
            f"centre inside, {how}", "share of boxes whose centre lies in the true box"
        ),
        f"{label}_centre_error": Entry(
            f"centre error, {how}", "distance between the centres, in sides of the image", -1
        ),
        f"{label}_area_ratio": Entry(
            f"area / true area, {how}", "1 is right; above 1 the boxes are too large", 0
        ),
        f"{label}_area": Entry(f"box area, {how}", "share of the image that a box covers", 0),
        f"{label}_parse_rate": Entry(
            f"readable boxes, {how}", "share of answers that can be read as a box"
        ),
        f"{label}_scale": Entry(
            f"best rescale, {how}", "the constant that suits this arm's boxes best", 0
        ),
        f"{label}_point_inside": Entry(
            f"marked place inside, {how}", "share of boxes that hold the place that was marked"
        ),
        f"{label}_point_error": Entry(
            f"distance from the marked place, {how}",
            "from the box's centre, in sides of the image",
            -1,
        ),
        f"{label}_point_area": Entry(
            f"area of boxes for marked places, {how}",
            "share of the image: a box of all of it holds every place",
            0,
        ),
    }


GROUPS: dict[str, dict[str, Entry]] = {
    "Finding objects: the most likely answer": _grounding("greedy", "greedy"),
    "Finding objects: sampled answers": _grounding("sampled", "sampled"),
    "Telling what is there": {
        "visible_accuracy": Entry(
            "visibility, all questions",
            "share of right yes/no answers, over the four kinds below together",
        ),
        "visible_present": Entry("yes to what is there", "objects of which at least half shows"),
        "visible_absent": Entry(
            "no to what is not there",
            "names that share colour or shape with an object of the scene, or your eval.absent",
        ),
        "visible_hidden": Entry("no to what is hidden", "the object's true box ghosted"),
        "visible_elsewhere": Entry(
            "yes with another place hidden", "a box of the same size, off the object, ghosted"
        ),
        "changed_elsewhere": Entry(
            "verdict changed by hiding elsewhere",
            "answers that change although the object does not (BEAF's ID)",
            -1,
        ),
    },
    "Hallucination (POPE: present against lookalike absent names)": {
        "pope_accuracy": Entry("POPE accuracy", "half of the names are there, half are not"),
        "pope_precision": Entry(
            "POPE precision", "of the names answered yes, those that are there"
        ),
        "pope_recall": Entry("POPE recall", "of the names that are there, those answered yes"),
        "pope_f1": Entry("POPE F1", "harmonic mean of the two"),
        "pope_yes_rate": Entry("POPE yes rate", "0.5 is balanced", 0),
    },
    "Hiding the true box (BEAF's table)": {
        "TU": Entry("TU: yes, then no", "understood: seen, and gone once hidden"),
        "SB": Entry("SB: yes, then yes", "stubborn: still seen once hidden", -1),
        "IG": Entry("IG: no, then yes", "ignorant: seen only once hidden", -1),
        "ID": Entry("ID: no, then no", "never seen", -1),
    },
    "Without labels: boxes for the base's own queries": {
        "invariance": Entry(
            "agreement across views",
            "(GIoU + 1) / 2 of the projected box and the box found in the view",
        ),
        "own_TU": Entry(
            "the box hides the object",
            "the base sees the object, and no longer once the arm's box is ghosted",
        ),
        "own_SB": Entry(
            "still seen behind the box", "the arm's box does not cover what the base sees", -1
        ),
        "own_IG": Entry("seen only behind the box", "the base says no, then yes", -1),
        "own_ID": Entry("not seen in the first place", "the base does not see what it named", 0),
        "own_area": Entry("box area", "share of the image", 0),
        "own_area_large": Entry(
            "boxes over 0.8 of the image", "the mark of a collapse to the full image", -1
        ),
        "own_zero_area": Entry(
            "boxes without area", "of the readable ones; they point at nothing", -1
        ),
        "own_parse_rate": Entry("readable boxes", "share of answers that can be read as a box"),
        "attention_share": Entry(
            "attention on the image",
            "share of attention on image tokens while a box is written, mean over layers",
            0,
        ),
        "query_parse_rate": Entry(
            "readable queries", "share of the arm's own queries that can be read"
        ),
        "query_present": Entry("queries that name a present object", "of the readable ones"),
        "distinct_queries": Entry(
            "different queries", "different texts among the arm's own queries", 0
        ),
    },
    "What training did not ask for: free answers": {
        "free_kl": Entry(
            "KL to the base, descriptions",
            "nat per token along the arm's own free descriptions; the base's is 0",
            -1,
        ),
        "free_length": Entry("tokens of a description", "cut at 64", 0),
        "free_yes": Entry(
            "yes to fixed questions", "the same plain questions about every image", 0
        ),
    },
    "Blind control (a grey image)": {
        "blind_iou": Entry(
            "mean IoU without looking", "what guessing gives; a gain here is not seeing", 0
        ),
        "blind_yes_rate": Entry("yes to a grey image", "should be 0", -1),
    },
}
BRIEF = (
    "sampled_iou",
    "sampled_iou_50",
    "sampled_iou_rescaled",
    "sampled_area_ratio",
    "greedy_iou",
    "greedy_iou_50",
    "greedy_iou_rescaled",
    "greedy_centre_error",
    "visible_accuracy",
    "pope_accuracy",
    "invariance",
    "own_TU",
    "own_area",
    "own_parse_rate",
    "attention_share",
)
"""The figures of a short table."""
ENTRIES: dict[str, Entry] = {}
for _group in GROUPS.values():
    ENTRIES |= _group


BY_CLASS = "By class: labelled pictures, the most likely answer"
MOST_CLASSES = 30
"""Classes that tables show, the most frequent ones; evaluation.json has all."""


def entry(name: str) -> Entry | None:
    """The figure's entry; of one class of labels, `figure:class`, that of the figure with the class
    in its title. None where it is not listed.
    """
    figure, _, of = name.partition(":")
    found = ENTRIES.get(figure)
    if found is None or not of:
        return found
    return Entry(f"{of}: {found.title}", found.meaning, found.better)


def classes(marks: Mapping[str, Mark]) -> dict[str, int]:
    """The MOST_CLASSES most frequent classes that an evaluation with labels has figures of, each
    with how many things of it were asked for.
    """
    start = "greedy_iou:"
    found = {
        name.removeprefix(start): int(bottom.sum())
        for name, (_, bottom) in marks.items()
        if name.startswith(start)
    }
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_CLASSES])


def of_class(name: str) -> list[str]:
    """The figures of one class, as `by class` shows them."""
    return [
        f"greedy_{figure}:{name}" for figure in ("iou", "iou_50", "centre_inside", "area_ratio")
    ]


def title(name: str) -> str:
    """The figure's title; its own name where it is not listed."""
    found = entry(name)
    return name if found is None else found.title
