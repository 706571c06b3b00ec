"""Label files: every form says the same of the same pictures, and what is wrong with one is counted
or one line.
"""

import json

import labelled
import numpy as np
import pytest
from PIL import Image as Pillow

from vise_fast.config.schema import load
from vise_fast.images.labels.checked import labelled as opened_by
from vise_fast.images.labels.label import BOX_1000, XYWH, XYXY, Mark, in_1000, mistaken
from vise_fast.images.labels.phrase import phrase
from vise_fast.system.errors import DataError

COUNT = 6


@pytest.fixture
def place(tmp_path):
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


@pytest.fixture(scope="module")
def drawn():
    return labelled.drawn(COUNT)


def opened(labels, *words):
    common = ["--data.max_pixels=16384", "--data.min_pixels=256"]
    return opened_by(load(None, [f"--eval.labels={labels}", *common, *words]), 16)


def refusal(labels, *words):
    with pytest.raises(DataError) as caught:
        opened(labels, *words)
    assert "\n" not in str(caught.value) and str(caught.value).count(";") >= 1
    assert caught.value.code == 3
    return str(caught.value)


def content(found):
    """{digest: {name: box}}"""
    return {
        picture.digest: {label.name: label.box_1000 for label in picture.objects}
        for picture in found.pictures
    }


# ---- the same of the same ------------------------------------------------------------------------


@pytest.mark.parametrize("form", labelled.FORMS)
def test_every_form_says_the_same(place, drawn, form):
    paths = labelled.save(place / "images", drawn)
    labels = labelled.FORMS[form](place, paths, drawn)
    found = opened(labels, f"--eval.label_images={place / 'images'}")
    wanted = opened(labelled.as_lines(place, paths, drawn))
    assert content(found).keys() == content(wanted).keys()
    for digest, things in content(wanted).items():
        assert content(found)[digest].keys() == things.keys()
        for name, box in things.items():
            assert content(found)[digest][name] == pytest.approx(box, abs=2e-3)
    truth = [thing.name for scene in drawn for thing in scene.objects]
    assert sum(len(p.objects) for p in found.pictures) == len(truth) and not found.odd.odd


def test_points(place, drawn):
    paths = labelled.save(place, drawn)
    found = opened(labelled.as_points(place, paths, drawn))
    assert sum(len(p.points) for p in found.pictures) == sum(len(s.objects) for s in drawn)
    assert not any(p.objects for p in found.pictures)


def test_a_data_yaml_names_pictures_and_classes(tmp_path, drawn):
    paths = labelled.save(tmp_path / "images" / "val", drawn)
    folder = labelled.as_yolo(tmp_path, paths, drawn)
    (tmp_path / "labels" / "val").mkdir(parents=True)
    for path in folder.glob("*.txt"):
        path.rename(tmp_path / "labels" / "val" / path.name)
    names = (tmp_path / "labels" / "val" / "classes.txt").read_text().split("\n")
    text = "val: images/val\nnames:\n" + "".join(f"  {i}: {n}\n" for i, n in enumerate(names))
    (tmp_path / "data.yaml").write_text(text)
    assert len(opened(tmp_path / "data.yaml").pictures) == COUNT
    (tmp_path / "data.yaml").write_text(text + "kpt_shape: [17, 3]\n")
    assert "keypoints" in refusal(tmp_path / "data.yaml")


def test_polygons_are_their_hull(place, drawn):
    (path,) = labelled.save(place, drawn[:1])
    path.with_suffix(".txt").write_text(
        "0 0.1 0.2 0.5 0.2 0.3 0.6\n0 nan 0 0 0\n7 .5 .5 .1 .1\n0 1 2"
    )
    (place / "obj.names").write_text("thing\n")
    with pytest.raises(DataError, match="of the 4 labels"):
        opened(place)
    path.with_suffix(".txt").write_text("0 0.1 0.2 0.5 0.2 0.3 0.6\n")
    (picture,) = opened(place).pictures
    assert picture.objects[0].box_1000 == pytest.approx((100, 200, 500, 600))


# ---- what is odd ---------------------------------------------------------------------------------


def lines(place, rows, count=1):
    paths = labelled.save(place, labelled.drawn(count, seed=3))
    path = place / "labels.jsonl"
    full = [{"image": paths[0].name, "name": "red cup"} | row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path


GOOD = [{"name": f"thing {i}", "box": [10, 10, 40 + i, 50]} for i in range(8)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"box": [10, 10, 10, 50]}, "without area"),
        ({"box": [40, 10, 10, 50]}, "without area"),
        ({"box": [10, 10, 10.2, 50]}, "without area"),
        ({"box": [-90, 10, 20, 50]}, "mostly outside"),
        ({"box": [float("nan"), 10, 20, 50]}, "four finite numbers"),
        ({"box": [1e400, 10, 20, 50]}, "four finite numbers"),
        ({"box": [10, 20, 30]}, "four finite numbers"),
        ({"box": "10,20,30,40"}, "four finite numbers"),
        ({"box": [True, 10, 20, 50]}, "four finite numbers"),
        ({"point": [200, 10]}, "points outside"),
        ({"name": "<box>", "box": [10, 10, 40, 50]}, "no phrase"),
        ({"name": "a" * 201, "box": [10, 10, 40, 50]}, "no phrase"),
        ({"name": "", "box": [10, 10, 40, 50]}, "without a name"),
        ({"image": "gone.png", "box": [10, 10, 40, 50]}, "not there"),
        ({"image": "", "box": [10, 10, 40, 50]}, "name no picture"),
    ],
)
def test_what_is_odd_is_left_out_and_said(place, row, said):
    found = opened(lines(place, [*GOOD, row]))
    assert said in found.describe() and sum(len(p.objects) for p in found.pictures) == len(GOOD)


def test_the_part_inside_counts(place):
    found = opened(lines(place, [{"box": [-10, 10, 64, 64], "name": "edge"}]))
    assert found.pictures[0].objects[0].box_1000 == pytest.approx((0, 78.125, 500, 500))


def test_several_of_a_name_and_crowds_are_not_asked_for(place):
    rows = [*GOOD, GOOD[0], {"name": "crowd", "box": [1, 1, 20, 20], "crowd": 1}]
    found = opened(lines(place, rows))
    asked = {label.name for label in found.pictures[0].objects}
    assert asked == {row["name"] for row in GOOD[1:]}
    assert "3 whose name others have" in found.describe()
    assert found.pictures[0].names.count(GOOD[0]["name"]) == 2


def test_a_picture_of_another_shape_or_shown_twice(place, drawn):
    paths = labelled.save(place, drawn)
    (place / "copy.png").write_bytes(paths[0].read_bytes())
    Pillow.open(paths[1]).save(place / "again.bmp")  # the same pixels in another file
    rows = [
        *({"image": p.name, "name": "a", "box": [10, 10, 40, 40]} for p in paths),
        {"image": "copy.png", "name": "a", "box": [10, 10, 40, 40]},
        {"image": "again.bmp", "name": "a", "box": [10, 10, 40, 40]},
    ]
    rows[2] |= {"width": 128, "height": 96}
    path = place / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = opened(path)
    assert found.odd.odd["pictures that show what another shows"] == 2
    assert found.odd.odd["pictures of another shape than their labels say"] == 1
    assert len(found.pictures) == COUNT - 1


def test_half_the_size_is_the_same_shape(place):
    found = opened(lines(place, [{"box": [16, 16, 32, 64], "width": 64, "height": 64}]))
    assert found.pictures[0].objects[0].box_1000 == pytest.approx((250, 250, 500, 1000))


# ---- files that are none -------------------------------------------------------------------------

BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;">]>
<annotation><filename>&b;</filename></annotation>"""
OUTSIDE = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<annotation><filename>&x;</filename></annotation>"""


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", "[]", "no lists images"),
        ("a.json", '{"images": [], "annotations": {}, "categories": []}', "no lists images"),
        ("a.json", "[" * 100_000, "is no JSON"),
        ("a.json", b"\xff\xfe\x00", "no UTF-8"),
        ("a.jsonl", "", "0 can be used"),
        ("a.jsonl", "{\n[1]\n3\n", "0 can be used"),
        ("a.xml", BOMB, "document type"),
        ("a.xml", OUTSIDE, "document type"),
        ("a.xml", "<annotation>", "no XML"),
        ("a.xml", "<a>" * 200, "deep"),
        ("a.yaml", "names: [a", "no YAML"),
        ("a.yaml", "- a", "no mapping"),
        ("a.yaml", "names: [a]", "no folder of pictures"),
        ("a.docx", "text", "no form that is known"),
    ],
)
def test_what_is_no_label_file_is_one_line(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in refusal(path)


def test_nothing_there_and_nothing_inside(tmp_path):
    assert "is not there" in refusal(tmp_path / "nowhere.json")
    assert "holds no .xml" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("0 .5 .5 .1 .1")
    assert "names the classes" in refusal(tmp_path)


def test_a_file_of_an_impossible_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "labels.json"
    with path.open("wb") as file:
        file.truncate(600 * 2**20)
    assert "bytes" in refusal(path) or "large" in refusal(path)


def test_missing_pictures_say_where_to_name_them(place, drawn):
    paths = labelled.save(place, drawn)
    labels = labelled.as_coco(place, paths, drawn)
    for path in paths[: COUNT // 2 + 1]:
        path.unlink()
    assert "--eval.label_images" in refusal(labels)


@pytest.mark.parametrize("form", labelled.FORMS)
def test_flipped_bytes_are_counted_or_one_line(place, form):
    drawn = labelled.drawn(2, seed=1)
    paths = labelled.save(place / "images", drawn)
    labels = labelled.FORMS[form](place, paths, drawn)
    files = [labels] if labels.is_file() else sorted(labels.rglob("*.[tx][xm][tl]"))
    whole = {file: file.read_bytes() for file in files}
    rng = np.random.default_rng(0)
    for _ in range(40):
        for file, content in whole.items():
            changed = bytearray(content)
            for where in rng.integers(0, len(content), rng.integers(1, 9)):
                changed[where] = rng.integers(0, 256)
            file.write_bytes(changed[: rng.integers(1, 2 * len(content))])
        try:
            found = opened(labels, f"--eval.label_images={place / 'images'}")
        except DataError as fault:
            assert "\n" not in str(fault)
        else:
            boxes = [label.box_1000 for p in found.pictures for label in p.objects]
            assert "\n" not in found.describe()
            assert all(0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000 for x1, y1, x2, y2 in boxes)


# ---- another form than its file's ----------------------------------------------------------------


def coco_with(place, drawn, change):
    paths = labelled.save(place, drawn)
    labels = labelled.as_coco(place, paths, drawn)
    known = json.loads(labels.read_text())
    for row in known["annotations"]:
        row["bbox"] = change(row["bbox"])
    labels.write_text(json.dumps(known))
    return labels


def test_corners_in_a_coco_file_are_refused(place, drawn):
    labels = coco_with(place, drawn, lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
    assert "look like x1,y1,x2,y2 in pixels" in refusal(labels)


def test_shares_in_a_coco_file_are_refused(place, drawn):
    labels = coco_with(
        place, drawn, lambda b: [b[0] / 128, b[1] / 128, (b[0] + b[2]) / 128, (b[1] + b[3]) / 128]
    )
    assert "as shares" in refusal(labels)
    labels = coco_with(place, drawn, lambda b: [value / 128 for value in b])
    assert "without area" in refusal(labels)


def test_sides_in_a_voc_file_are_refused(place, drawn):
    paths = labelled.save(place / "images", drawn)
    folder = labelled.as_voc(place, paths, drawn)
    for path, scene in zip(sorted(folder.glob("*.xml")), drawn, strict=True):
        text = path.read_text()
        for thing in scene.objects:
            x1, y1, x2, y2 = labelled.px(thing)
            text = text.replace(f"<xmax>{x2}</xmax>", f"<xmax>{x2 - x1}</xmax>")
            text = text.replace(f"<ymax>{y2}</ymax>", f"<ymax>{y2 - y1}</ymax>")
        path.write_text(text)
    assert "look like x,y,w,h in pixels" in refusal(folder)


def test_pixels_in_a_yolo_file_are_refused(place, drawn):
    paths = labelled.save(place, drawn)
    labelled.as_yolo(place, paths, drawn)
    for path, scene in zip(paths, drawn, strict=True):
        rows = [f"0 {' '.join(f'{v:.1f}' for v in labelled.px(thing))}" for thing in scene.objects]
        path.with_suffix(".txt").write_text("\n".join(rows))
    assert "look like x1,y1,x2,y2 in pixels" in refusal(place)


def test_right_boxes_are_never_taken_for_mistaken():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = rng.uniform(0, 90, 2)
        sides = rng.uniform(4, (100 - x, 100 - y))
        boxes = [(Mark("a", XYWH, (x, y, *sides)), (100, 100))]
        corners = (x, y, x + sides[0], y + sides[1])
        assert mistaken(boxes) is None
        assert mistaken([(Mark("a", XYXY, corners), (100, 100))]) is None
        assert in_1000(boxes[0][0], (100, 100)) == pytest.approx([10 * value for value in corners])
    assert mistaken([]) is None
    assert mistaken([(Mark("a", BOX_1000, (5.0, 5.0, 1.0, 1.0)), (100, 100))]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  red   cup\t", "red cup"),
        ("Ampel 🚦", "Ampel 🚦"),
        ("", None),
        (3, None),
        ("a\u202eb", None),
        ("a<|im_end|>", None),
        ("a" * 200, "a" * 200),
        ("a" * 201, None),
    ],
)
def test_phrases(text, said):
    assert phrase(text) == said
