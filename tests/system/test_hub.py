"""Whether the hub can be asked: once, for seconds, and what follows where it cannot."""

import socket
import urllib.error
from email.message import Message

import pytest
from huggingface_hub import constants

from vise_fast.config import commands
from vise_fast.system import console, hub
from vise_fast.system.errors import EnvironmentFault

NO_NAME = urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))
LATE = urllib.error.URLError(TimeoutError("timed out"))
CLOSED = urllib.error.URLError(ConnectionRefusedError(111, "refused"))
FORBIDDEN = urllib.error.HTTPError("https://hub", 403, "no", Message(), None)
UNKNOWN_AUTHORITY = urllib.error.URLError("certificate verify failed")


@pytest.fixture
def asked(monkeypatch):
    """Makes the hub answer with a fault (None: well); the times it was asked."""
    times = []
    hub.answers.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answering(fault):
        def urlopen(request, timeout):
            times.append(timeout)
            if fault is not None:
                raise fault
            return socket.socket()

        monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
        return times

    yield answering
    hub.answers.cache_clear()


@pytest.mark.parametrize("fault", [NO_NAME, LATE, CLOSED, TimeoutError(), ConnectionResetError()])
def test_a_hub_that_does_not_answer_is_asked_once_and_is_exit_four(fault, asked, capsys):
    times = asked(fault)
    words = ["--model.path", "somebody/no-model"]
    for _ in range(2):
        assert console.run(lambda given: commands.check("train", given), words) == 4
    said = capsys.readouterr().err
    assert len(times) == 1 and times[0] <= 5
    assert "hf download somebody/no-model" in said and said.count("\n") == 2


@pytest.mark.parametrize("fault", [None, FORBIDDEN, UNKNOWN_AUTHORITY])
def test_a_hub_that_answers_is_left_to_the_libraries(fault, asked):
    asked(fault)
    hub.reach("somebody/no-model", "somebody/no-model")
    assert constants.HF_HUB_OFFLINE is False


def test_what_is_cached_is_used_where_the_hub_does_not_answer(asked, monkeypatch):
    asked(NO_NAME)
    monkeypatch.setattr(hub, "is_cached", lambda source: True)
    hub.reach("somebody/model", "somebody/model")
    assert constants.HF_HUB_OFFLINE is True


def test_who_wants_no_network_is_not_asked_for_one(asked, monkeypatch):
    times = asked(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="hf download"):
        hub.reach("somebody/no-model", "no-model")
    assert not times


@pytest.mark.parametrize("words", [[], ["--model.path", "/no/where"], ["--dry-run"]])
def test_where_no_hub_is_needed_none_is_asked(words, asked):
    times = asked(NO_NAME)
    if words == ["--dry-run"]:
        words += ["--model.path", "somebody/no-model"]
    commands.check("train", words)
    assert not times


def test_a_directory_needs_no_hub(asked, tmp_path):
    times = asked(NO_NAME)
    hub.reach(str(tmp_path), "my-model")
    assert not times
