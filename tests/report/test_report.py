"""The report: what it concludes from runs of known health, that it stands alone, and that nothing a
model wrote becomes markup.
"""

import html.parser
import json
import re
import sys
import xml.etree.ElementTree as xml

import fake_run
import numpy as np
import pytest
import yaml
from PIL import Image

from vise_fast.config.schema import load
from vise_fast.evaluate import strengths
from vise_fast.evaluate.results import Results, paired_gain
from vise_fast.evaluate.titles import ENTRIES
from vise_fast.report import __main__ as command
from vise_fast.report import comparison, diagnosis, stored_run
from vise_fast.report import page as report
from vise_fast.report.plots import DPI
from vise_fast.report.samples import STRIP, samples, strip
from vise_fast.system.errors import ConfigError, DataError

EVIL = "</h1><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }}"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    run = fake_run.write(tmp_path_factory.mktemp("runs") / "healthy", query=EVIL)
    return run, report.write(run).read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes, and whether open tags are closed in order."""

    VOID = {"meta", "img", "br", "hr", "link", "input", "path", "rect", "use"}

    def __init__(self, page):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed(healthy):
    assert Tags(healthy[1]).open == []


def test_model_written_text_never_becomes_markup(healthy):
    page = healthy[1]
    tags = Tags(page).seen
    assert not [tag for tag, _ in tags if tag == "script"]
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        and "{{ 7*7 }}" in page
        and "49</p>" not in page
    )


def test_the_page_fetches_nothing(healthy):
    tags = Tags(healthy[1]).seen
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert "@import" not in healthy[1] and not re.search(r"url\((?!#|data:)", healthy[1])
    assert "default-src 'none'" in healthy[1]


def test_plots_are_png_files_and_well_formed_themed_svg(healthy):
    run, page = healthy
    names = {path.stem for path in (run / "plots").iterdir()}
    assert names == {
        "reward",
        "kl",
        "area",
        "readable",
        "verdicts",
        "gradient",
        "attention",
        "phases",
        "speed",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "plots").iterdir())
    charts = [found for found in re.findall(r"<svg .*?</svg>", page, re.S) if 'role="img"' in found]
    assert len(charts) == len(names)
    for chart in charts:
        xml.fromstring(chart.replace("xlink:href", "href"))
        assert "var(--" in chart and "#2c6aa8" not in chart


def test_reports_repeat_byte_for_byte(healthy):
    run, page = healthy
    assert report.write(run).read_text(encoding="utf-8") == page


def test_every_figure_of_the_evaluation_is_in_the_table(healthy):
    run, page = healthy
    for name in stored_run.read(run).after.values:
        assert ENTRIES[name].title in page, name


def test_samples_show_image_views_ghost_and_verdicts(healthy):
    shown = samples(stored_run.read(healthy[0]))
    assert list(shown) == ["Step 1", "Step 30", "Step 60"]
    sample = shown["Step 60"][0]
    assert sample.query == EVIL and len(sample.pictures) == 1 + load().rollout.views + 1
    image, first, *_, ghost = sample.pictures
    assert [box.kind for box in image.boxes].count("chosen") == 1 and image.boxes[
        -1
    ].kind == "chosen", "drawn last, on top"
    assert {box.kind for box in first.boxes} == {
        "expected",
        "found",
    } and ghost.src != image.src != first.src
    assert [v.wanted for v in sample.verdicts] == [True, False, True, True]


def test_chosen_box_is_the_best_rewarded_one_with_area(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=10)
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    lines[0] |= {
        "rewards": [0.9, 0.1] + [0.0] * 6,
        "boxes_1000": [[0, 0, 0, 0], [100, 200, 300, 400]] + [[1, 1, 5, 5]] * 6,
        "readable": [True] * 8,
    }
    (run / "samples.jsonl").write_text(json.dumps(lines[0]) + "\n")
    chosen = [
        box
        for box in samples(stored_run.read(run))["Step 1"][0].pictures[0].boxes
        if box.kind == "chosen"
    ]
    assert (chosen[0].x, chosen[0].y) == (10.0, 20.0)


# ---- the diagnosis -------------------------------------------------------------------------------


def diagnosed(tmp_path, kind="healthy", edit=lambda metrics: metrics, **options):
    run = fake_run.write(tmp_path / "run", kind, **options)
    lines = [edit(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return diagnosis.diagnose(stored_run.read(run))


def texts(found, level):
    return " ".join(finding.text for finding in found.findings if finding.level == level)


def test_a_healthy_run_is_called_healthy(tmp_path):
    found = diagnosed(tmp_path)
    assert (found.level, found.headline) == ("good", "Healthy: it learned")
    assert "Grounding improved" in texts(found, "good") and "not one of size" in texts(
        found, "good"
    )


def test_a_collapsed_run_is_called_unhealthy_for_its_reasons(tmp_path):
    found = diagnosed(tmp_path, "collapsed")
    assert (found.level, found.headline) == ("bad", "Not healthy")
    for reason in (
        "Grounding got worse",
        "times the area",
        "paid for size",
        "collapsed to the full image",
        "alarm 'area'",
    ):
        assert reason in texts(found, "bad"), reason
    assert found.findings[0].level == "bad"


def test_photographs_are_judged_without_labels(tmp_path):
    found = diagnosed(tmp_path, "photographs")
    assert found.level == "good" and "without labels" in texts(found, "good")


def test_a_gain_that_a_rescale_explains_is_not_celebrated(tmp_path, monkeypatch):
    monkeypatch.setitem(fake_run.GAINS, "iou_rescaled", 0.0)
    found = diagnosed(tmp_path)
    assert found.level == "warn" and "may be one of size" in texts(found, "warn")


def test_no_gain_is_called_no_gain(tmp_path, monkeypatch):
    for name in ("iou", "iou_50", "iou_rescaled"):
        monkeypatch.setitem(fake_run.GAINS, name, 0.0)
    found = diagnosed(tmp_path)
    assert found.headline == "Healthy, but no gain is shown" and "include zero" in texts(
        found, "note"
    )


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"parse_rate": 0.5}, "bad", "could be read"),
        ({"parse_rate": 0.85}, "warn", "could be read"),
        ({"kl": 0.5}, "bad", "nat per token"),
        ({"kl": 0.08}, "warn", "nat per token"),
        ({"carries": 0.01}, "warn", "carried any gradient"),
        ({"grad_norm": None}, "warn", "not finite"),
        ({"area_large": 0.5}, "bad", "full image"),
        ({"alarms": ["kl"]}, "bad", "alarm 'kl'"),
    ],
)
def test_each_fault_is_named(tmp_path, change, level, said):
    found = diagnosed(tmp_path, edit=lambda metrics: metrics | change)
    assert said in texts(found, level)
    assert found.level == level


def test_an_alarm_that_went_off_is_a_note(tmp_path):
    found = diagnosed(
        tmp_path, edit=lambda m: m | {"alarms": ["area"] if m["step"] in (20, 21) else []}
    )
    assert found.level == "good" and "went off again" in texts(found, "note")


@pytest.mark.parametrize("label", ["sampled", "greedy"])
def test_boxes_of_the_wrong_size_are_named_whoever_answered(tmp_path, label):
    run = fake_run.write(tmp_path / "run")
    content = json.loads((run / "evaluation.json").read_text())
    after = content["after"]
    mark = after["marks"][f"{label}_area_ratio"]
    mark["top"] = [2 * top for top in mark["top"]]
    del after["sha256"]
    (run / "evaluation.json").write_text(json.dumps(content))
    found = diagnosis.diagnose(stored_run.read(run))
    assert f"{label.capitalize()} boxes cover 1.9" in texts(found, "bad")
    other = {"sampled": "Greedy", "greedy": "Sampled"}[label]
    assert f"{other} boxes cover 0.9" in texts(found, "good")


def test_a_run_that_is_not_finished_shows_no_figure_of_the_base_as_its_own(tmp_path):
    run = fake_run.write(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:20]))
    content = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({"before": content["before"]}))
    page = report.write(run).read_text()
    assert "not finished: step 20 of 60" in page and "Not finished (step 20 of 60)" in page
    tiles = re.findall(r'<p class="value">(.*?)</p>', page)
    assert tiles and set(tiles) == {"–"} and page.count("not measured yet") == len(tiles)
    assert "vise-fast train --resume auto --run.dir" in page


def test_tiles_tell_how_many_images_and_how_certain(healthy):
    page = healthy[1]
    tiles = page.split('aria-label="Key figures"')[1].split("</section>")[0]
    assert tiles.count("n 96") == report.TILE_COUNT
    gain = paired_gain(*arms(healthy[0]), "sampled_iou")
    wanted = f"95 % {gain.low:+.3f} to {gain.high:+.3f}".replace("-", "−")
    assert wanted in tiles


def arms(run):
    found = stored_run.read(run)
    return found.before, found.after


def test_the_page_says_what_comes_next_how_it_was_started_and_what_could_not_be_used(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=4)
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "bad_images.jsonl").write_text('{"name": "a<b>.png", "reason": "is cut short"}\n')
    page = report.write(run).read_text()
    assert f"vise-fast infer --adapter {run / 'adapter'} --image photo.jpg" in page
    assert "vise-fast train --seed 1" in page  # env.json's words
    assert "1 files that could not be used" in page and "a&lt;b&gt;.png: is cut short" in page
    targets = re.findall(r'<a href="#(\w+)"', page)
    assert len(targets) == 5 and all(f'id="{target}"' in page for target in targets)


def course(run, *steps, **best):
    """Evaluations between updates: the base's figures first, then the adapter's."""
    content = json.loads((run / "evaluation.json").read_text())
    arms = [content["before"], *[content["after"]] * (len(steps) - 1)]
    lines = [{"step": step} | arm for step, arm in zip(steps, arms, strict=True)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluation.json").write_text(json.dumps(content | best))
    return run


BEST = {"figure": "sampled_iou", "step": 20, "value": 0.51, "last": 60, "patience": False}


def test_evaluations_while_it_trained_are_gains_with_bands_and_the_chosen_one_is_named(tmp_path):
    run = course(fake_run.write(tmp_path / "run"), 10, 20, best=BEST)
    page = report.write(run).read_text()
    assert (run / "plots" / "course.png").exists() and "Held out, while it trained" in page
    assert "after step 20, the best by sampled_iou (0.510) of 60 steps" in page
    assert "<dt>chosen</dt><dd>step 20, the best by sampled_iou</dd>" in page
    plain = fake_run.write(tmp_path / "plain")
    assert "Held out, while" not in report.write(plain).read_text()


def test_photographs_have_curves_without_truth(tmp_path):
    run = course(fake_run.write(tmp_path / "run", "photographs"), 10, 20)
    page = report.write(run).read_text()
    chart = page.partition("Held out, while it trained</h3>")[2].partition("</svg>")[0]
    assert "hides its object" in chart and "IoU" not in chart


@pytest.mark.parametrize("best", [3, {}, BEST | {"step": "20"}, BEST | {"more": 1}])
def test_a_choice_that_no_run_made_is_damaged(tmp_path, best):
    run = course(fake_run.write(tmp_path / "run", steps=2), 1, best=best)
    with pytest.raises(DataError, match="evaluation.json is damaged"):
        report.write(run)


def test_an_evaluation_that_was_not_measured_is_damaged(tmp_path):
    run = course(fake_run.write(tmp_path / "run", steps=2), 1, 2)
    lines = (run / "evaluations.jsonl").read_text().replace('"n": 96', '"n": 95')
    (run / "evaluations.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"evaluations.jsonl is damaged at step 1"):
        report.write(run)


def test_from_a_handful_of_images_nothing_is_concluded(tmp_path, monkeypatch):
    """However large the gains look: no verdict, no colour, no interval."""
    monkeypatch.setattr(fake_run, "SCENES", 19)
    run = course(fake_run.write(tmp_path / "run"), 10, 20)
    found = diagnosis.diagnose(stored_run.read(run))
    assert "Only 19 held-out images: too few to tell" in texts(found, "warn")
    assert found.headline == "Healthy, but no gain is shown"
    page = report.write(run).read_text()
    words = re.sub("data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert "inf" not in re.sub("[a-z]*inf[a-z]+|[a-z]+inf[a-z]*", "", words)
    assert page.count("too few to tell") > 2 * report.TILE_COUNT
    assert 'class="delta good"' not in page and 'class="interval' not in page
    both = comparison.compare([stored_run.read(run), stored_run.read(run)])
    assert "too few to tell" in comparison.row(both.lines[0])[2]
    shown = comparison.render(both, [])
    assert "too few to tell" in shown and "(−inf" not in shown and 'small class="good"' not in shown


def test_boxes_over_training_are_a_strip(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=12)
    frames = strip(stored_run.read(run))
    assert [frame.caption for frame in frames] == ["step 1", "step 6", "step 12"]
    assert all(frame.boxes and {box.kind for box in frame.boxes} == {"sampled"} for frame in frames)
    first = (run / "samples.jsonl").read_text().splitlines()[0]
    many = [json.dumps(json.loads(first) | {"step": step}) for step in range(1, 41)]
    (run / "samples.jsonl").write_text("\n".join(many) + "\n")
    assert len(strip(stored_run.read(run))) == STRIP


def test_what_size_costs_is_a_curve_and_pictures_carry_title_and_name(tmp_path):
    with_size = fake_run.write(tmp_path / "a", steps=4)
    without = fake_run.write(tmp_path / "b", steps=4, config_words=["--reward.w_area=0"])
    for run in (with_size, without):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps(line | {"size": 0.3}) + "\n" for line in lines)
        )
    assert "less: size" in report.write(with_size).read_text()
    assert "less: size" not in report.write(without).read_text()
    one, other = (Image.open(tmp_path / name / "plots" / "kl.png") for name in "ab")
    head = (0, 0, one.width, round(0.28 * DPI))
    assert np.array(one.crop(head)).min() < 100  # there is text
    assert one.size == other.size and one.crop(head).tobytes() != other.crop(head).tobytes()


def test_a_report_without_matplotlib_lacks_its_curves_alone(tmp_path, monkeypatch):
    run = fake_run.write(tmp_path / "run", steps=3)
    monkeypatch.setitem(sys.modules, "vise_fast.report.plots", None)
    said = []
    page = report.write(run, said.append).read_text()
    assert "mean IoU, sampled" in page and 'role="img"' not in page
    assert len(said) == 1 and "pip install matplotlib" in said[0]


def test_an_unfinished_run_says_so(tmp_path):
    run = fake_run.write(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:20]))
    assert "ended after 20 of 60" in texts(diagnosis.diagnose(stored_run.read(run)), "warn")


# ---- runs that are not whole ---------------------------------------------------------------------


def test_metrics_alone_make_a_report(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=3)
    for name in ("samples.jsonl", "evaluation.json", "env.json", "config.yaml"):
        (run / name).unlink()
    page = report.write(run).read_text()
    assert "nothing shows that it learned" in page and "What it looked at" not in page


def test_old_metrics_without_most_keys_make_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.1}\n{"step": 2, "reward": null}\n{"broken'
    )
    report.write(tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["reward.png"]


def test_long_runs_keep_the_page_small(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=2000)
    (run / "samples.jsonl").unlink()
    assert len(report.write(run).read_text()) < 600_000


def test_one_arm_only(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=10)
    content = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({"before": content["before"]}))
    assert "nothing shows that it learned" in report.write(run).read_text()


@pytest.mark.parametrize("name", ["evaluation.json", "env.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"before": {}}', '{"before": 3}'])
def test_damaged_json_is_a_data_error(tmp_path, name, content):
    run = fake_run.write(tmp_path / "run", steps=2)
    (run / name).write_text(content)
    if name == "env.json" and content.startswith('{"'):
        report.write(run)
        return
    with pytest.raises(DataError, match=name):
        report.write(run)


@pytest.mark.parametrize(
    "change",
    [
        {"image": "../../secret.png"},
        {"image": "/etc/hostname"},
        {"image": "samples/none.png"},
        {"boxes_1000": [[1, 2]]},
        {"views": [{"kind": "flip"}]},
    ],
)
def test_damaged_samples_are_a_data_error_and_no_file_outside_is_read(tmp_path, change):
    run = fake_run.write(tmp_path / "run", steps=1)
    (tmp_path.parent / "secret.png").write_bytes(next((run / "samples").iterdir()).read_bytes())
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    (run / "samples.jsonl").write_text(json.dumps(sample | change) + "\n")
    with pytest.raises(DataError, match="samples.jsonl"):
        report.write(run)


def test_no_run_no_report(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        report.write(tmp_path)


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--train.lr", "1"], ["--what", "a"]])
def test_wrong_words_are_config_errors(words):
    with pytest.raises(ConfigError):
        command.main(words)


def test_the_command_says_where_the_page_is(tmp_path, capsys):
    run = fake_run.write(tmp_path / "run", steps=2)
    assert command.main([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out.replace("\n", "")


def test_ghosts_that_nobody_judged_are_not_shown_as_gone(tmp_path):
    """A query the judge does not see is gated: zeros stand where no verdict was asked for."""
    run = fake_run.write(tmp_path / "run", steps=1)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0]) | {
        "seen": 0.3,
        "gone": [0.0] * 8,
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    verdicts = samples(stored_run.read(run))["Step 1"][0].verdicts
    assert [v.label for v in verdicts] == ["as it is"] and not verdicts[0].right


@pytest.mark.parametrize("further, labels", [(True, 4), (False, 2)])
def test_what_was_not_asked_of_a_settled_box_is_not_shown(tmp_path, further, labels):
    """Its controls and keep are zeros that nobody said."""
    run = fake_run.write(tmp_path / "run", steps=1)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0]) | {
        "seen": 0.9,
        "gone": [0.95] * 8,
        "control": [[0.0]] * 8,
        "keep": [0.0] * 8,
        "further": [further] * 8,
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    verdicts = samples(stored_run.read(run))["Step 1"][0].verdicts
    assert len(verdicts) == labels and verdicts[1].label == "box hidden"


def test_figures_over_alpha_are_drawn_where_they_were_measured(tmp_path):
    run = fake_run.write(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    arms = {0.0: "before", 1.0: "after"}
    both = {alpha: Results.read(evaluation[arm]) for alpha, arm in arms.items()}
    (run / "strengths.json").write_text(json.dumps(strengths.write_down(both)))
    assert "How much of the adapter" in report.write(run).read_text(encoding="utf-8")
    assert (run / "plots" / "strengths.png").is_file()
    (run / "strengths.json").write_text('{"strengths": 3}')
    with pytest.raises(DataError, match="strengths.json is damaged"):
        report.write(run)


def test_no_code_that_a_run_names_is_run_to_show_it(tmp_path):
    run = fake_run.write(tmp_path / "run", steps=2)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w')")
    text = (run / "config.yaml").read_text()
    content = yaml.safe_load(text)
    content["run"]["plugins"] = [str(tmp_path / "evil.py"), str(tmp_path / "gone.py")]
    content["view"]["kinds"] = ["upside_down"]
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert "upside_down" in report.write(run).read_text(encoding="utf-8")
    assert not (tmp_path / "was here").exists()
