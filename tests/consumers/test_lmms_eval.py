"""lmms-eval on the shipped tasks: a linked directory and a merged one evaluate, as sample logs with
scores of their own.
"""

import sys

import pytest

from vise_fast.table import drawn, lmms_eval
from vise_fast.table.lmms_eval import Setting
from vise_fast.text.prompts import SHORT

pytest.importorskip("lmms_eval")
SETTING = Setting("cpu", min_pixels=1024, max_pixels=65536)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks") / "drawn"
    drawn.write(place, SHORT, 4)
    return place


@pytest.mark.parametrize("form", ["linked", "merged"])
def test_a_whole_directory_evaluates(forms, tasks, form, tmp_path):
    out = tmp_path / "out"
    names = ",".join(task.name for task in drawn.TASKS)
    words = lmms_eval.command(sys.executable, forms[form], names, out, SETTING, tasks)
    lmms_eval.run(words, tmp_path / "log", offline=True)
    for task in drawn.TASKS:
        rows = lmms_eval.samples(out, task.name)
        assert len(rows) >= 4 and all(figure in rows[0] for figure in task.figures), rows[0]
        assert any(lmms_eval.answer(row) for row in rows)
    boxes = lmms_eval.samples(out, "drawn_boxes")
    assert sum(row["readable"] for row in boxes) > len(boxes) / 2
