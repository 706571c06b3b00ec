"""What a logger is told of a run: its steps, and the table before and after, which comes last."""

import json

from small_runs import SMALL, go, lines

from vise_fast.system.loggers import KINDS


class Recording:
    """A logger that keeps what it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, run_dir, settings):
        return self

    def log(self, step, figures):
        self.told.append((step, dict(figures)))

    def close(self):
        self.told.append("closed")


def test_the_table_before_and_after_reaches_a_logger(tmp_path, monkeypatch):
    recording = Recording()
    monkeypatch.setitem(KINDS, "trackio", recording)
    words = ["--run.dir", tmp_path / "run", "--train.steps", 1, "--run.loggers", "trackio"]
    assert go(*words, *SMALL) == 0
    first, table, last = recording.told
    assert last == "closed" and (first[0], table[0]) == (1, 1)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first[1]["reward"] == metrics["reward"]
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for arm, label in (("before", "base"), ("after", "adapter")):
        value = table[1][f"held_out/{label}/sampled_iou"]
        assert value == evaluation[arm]["values"]["sampled_iou"]
