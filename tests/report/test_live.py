"""The page that follows a run: on loopback alone, fetched again while the run goes on, and drawn no
more often than it may.
"""

import http.client
import json
import shutil
import subprocess
import threading

import fake_run
import pytest

from vise_fast.report import __main__ as command
from vise_fast.report import live
from vise_fast.system import console
from vise_fast.system.errors import EnvironmentFault

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def going_on(tmp_path):
    """A run of twelve steps after its fifth."""
    run = fake_run.write(tmp_path / "run", steps=12)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    content = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({"before": content["before"]}))
    return run, lines, content


@pytest.fixture
def served(going_on):
    """The port of a server of that run."""
    with live.server(going_on[0], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="/", host=None):
    connection = http.client.HTTPConnection(live.HOST, server.server_port)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_run_and_rests_when_it_is_done(going_on):
    run, lines, content = going_on
    now = [0.0]
    pages = live.Pages(run, clock=lambda: now[0])
    first = pages.current()
    assert "not finished: step 5 of 12" in first and 'http-equiv="refresh"' in first
    assert "0.4" not in first.split('class="value">')[1][:4]  # the base's figure is not "now"
    assert pages.current() is first and pages.drawn == 1  # nothing changed: nothing drawn
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "evaluation.json").write_text(json.dumps(content))
    last = pages.current()
    assert "not finished" not in last and 'http-equiv="refresh"' not in last and pages.drawn == 2
    assert not (run / "report.html").exists() and not (run / "plots").exists()


def test_drawing_takes_no_more_than_its_share(going_on):
    run, lines, _ = going_on
    ticks = iter(range(0, 10_000, 1))
    pages = live.Pages(run, clock=lambda: float(next(ticks)))  # every look takes a second
    for step in range(5, 12):
        (run / "metrics.jsonl").write_text("".join(lines[:step]))
        pages.current()
    assert pages.drawn == 1


def test_before_the_first_step_there_is_a_page_that_asks_again(tmp_path):
    page = live.Pages(tmp_path).current()
    assert "No step is finished yet" in page and 'http-equiv="refresh"' in page


def test_it_answers_on_loopback_and_to_its_own_names_alone(served):
    assert served.server_address[0] == "127.0.0.1"
    assert ask(served)[0] == 200
    assert ask(served, host=f"localhost:{served.server_port}")[0] == 200
    assert ask(served, host=f"evil.example:{served.server_port}")[0] == 403
    for path in ("/metrics.jsonl", "/../config.yaml", "/?x"):
        assert ask(served, path)[0] == 404


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_it(served, tmp_path):
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'browser'}",
            "--dump-dom",
            f"http://{live.HOST}:{served.server_port}/",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "not finished: step 5 of 12" in done.stdout and "Reward and its parts" in done.stdout


def test_a_port_that_is_taken_and_a_run_that_is_not_there(served, tmp_path, capsys):
    with pytest.raises(EnvironmentFault, match="--port"):
        live.server(tmp_path, served.server_port)
    assert console.run(command.main, [str(tmp_path / "no"), "--live"]) == 3
    assert "is no directory" in capsys.readouterr().err
