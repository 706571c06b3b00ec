"""The table of goals says what result files say and nothing else."""

import json

import benches
import pytest

goals = benches.module("goals")
FLOOR_S = {"step": 0.05, "ask": 0.01, "encode": 0.005}
WALL = {"clock": "wall, synchronised"}


@pytest.fixture
def table(tmp_path):
    """Rows by goal, from documents: {file name: content} and the suite's lines."""

    def of(files, lines=()):
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        suite = tmp_path / "gpu"
        suite.mkdir()
        (suite / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return {row["goal"][:3].strip(): row for row in goals.rows(goals.gather(tmp_path, suite))}

    return of


def step(seconds, **parts):
    whole = {"step": {"median_s": seconds}, "images_per_s": 1 / seconds}
    return whole | {"seconds": {"step": seconds, **parts}, "floor_s": FLOOR_S}


def rollout(machine):
    engines = {"graphed": step(0.1, ask=0.02), "naive": step(2.5)}
    result = {"batch": 1, "engines": engines}
    setting = {"model": "qwen3-vl-2b"}
    return {"bench": "rollout", "machine": machine, "setting": setting, "results": [result]}


def test_without_results_every_row_says_so(table):
    assert {(row["measured"], row["forecast"]) for row in table({}).values()} == {(None, None)}


def test_the_suites_lines_are_read(table):
    rows = table({}, [{"part": "rollout-2b-b1", "document": rollout(WALL)}])
    assert rows["S1"]["measured"] == "100 ms, 10.0 images/s, 25.0x naive, naive+ not measured"
    assert rows["S4"]["measured"] == "50%"
    assert rows["S2"]["measured"] is None


def test_decoding_is_compared_with_generate_batch_by_batch(table):
    document = rollout(WALL)
    for batch, slow in ((1, 0.36), (32, 0.16)):
        engines = {
            "graphed": step(0.1, ask=0.01, ground=0.02, encode=0.02),
            "naive+": step(1.0, ask=slow / 4, ground=3 * slow / 4),
        }
        document["results"].append({"batch": batch, "engines": engines})
    document["results"].pop(0)
    rows = table({}, [{"part": "rollout", "document": document}])
    assert rows["S5"]["measured"] == "12.0x at batch 1, 5.3x at batch 32"


def test_starts_are_told_one_by_one(table):
    starts = [{"first_update_s": 21.04, "logprob_gap": 0.0042}, {"first_update_s": 9.5}]
    starts[1]["logprob_gap"] = None  # nothing was scored
    document = {"bench": "start", "machine": WALL, "model": "/weights/2b", "starts": starts}
    rows = table({}, [{"part": "start", "document": document}])
    assert rows["S13"]["measured"] == "21, 9.5 s, 2b"
    assert rows["S14"]["measured"] == "0.0042 nat, 2b"


def test_times_alone_and_profiled_steps_are_read_too(table):
    document = rollout(WALL)
    for engine in document["results"][0]["engines"].values():
        del engine["seconds"], engine["floor_s"]  # rollout.py --times-only
    profiled = rollout(WALL) | {"bench": "profile_step"}
    profiled["results"][0]["batch"] = 32
    for engine in profiled["results"][0]["engines"].values():
        del engine["floor_s"]
    setting = {"model": "qwen3-vl-2b", "preset": "robust"}
    other = rollout(WALL) | {"bench": "profile_step", "setting": setting}
    lines = [{"part": "x", "document": found} for found in (document, profiled, other)]
    rows = table({}, lines)
    assert rows["S1"]["measured"] == "100 ms, 10.0 images/s, 25.0x naive, naive+ not measured"
    assert rows["S4"]["measured"] is None and rows["S5"]["measured"] is None
    assert rows["S2"]["measured"].startswith("100 ms, 10.0 images/s")


def test_a_cpus_figures_are_no_answer(table):
    cpu = {"clock": "CPU time of the process"}
    rows = table({"rollout-x.json": rollout(cpu)}, [{"part": "x", "document": rollout(cpu)}])
    assert rows["S1"]["measured"] is None


def test_a_part_that_failed_has_no_document(table):
    assert table({}, [{"part": "rollout", "document": None}])["S1"]["measured"] is None


def test_counts_and_forecasts_stand_apart(table):
    case = {"launches": 4977, "blocking_copies": 0, "reads": 6}
    case["forecast_ms"] = {goals.CARD: {"sum": 92.0}}
    rows = table({"launches-qwen3-vl-2b.json": {"bench": "launches", "cases": {"paper_1": case}}})
    assert rows["S1"] | {"wanted": ""} == {
        "goal": "S1 paper, 1 image",
        "wanted": "",
        "measured": None,
        "forecast": "92 ms, 10.9 images/s",
    }
    assert rows["S3"]["forecast"].startswith("6.1 min")
    assert rows["rea"]["measured"] == "6 counted"


def test_a_peer_that_is_not_there_is_said_in_one_line(monkeypatch):
    peers = benches.module("peers")
    monkeypatch.setattr(peers.measure, "installed", lambda name: False)
    with pytest.raises(SystemExit, match=r"needs TRL, which is not installed; pip install trl"):
        peers.main(["--smoke"])
