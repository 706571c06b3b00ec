"""A disk that refuses ends a run in good order: one line, exit code 4, no traceback; the last
complete update is saved where the disk lets, what was written before stays whole, and when the disk
is well again the run goes on to the result of one that nothing happened to.

The faults inside a checkpoint's own files are tests/system/test_checkpoint.py.
"""

import resource
import shutil

import pytest
from faults.forked import again, go, words
from faults.left import left, sound, steps_saved
from faults.places import refuse_at

OPENING = (
    "EACCES make .",
    "ENAMETOOLONG make .",
    "ENOSPC make .",
    "EROFS open .lock",
    "EMFILE open .lock",
    "ENOSPC open .run.json.partial",
    "ENOSPC write .run.json.partial half",
    "EIO sync .run.json.partial",
    "EACCES rename run.json",
    "EIO sync .",
    "EROFS open .config.yaml.partial",
    "EDQUOT write .config.yaml.partial half",
    "ENOSPC rename config.yaml",
    "ENOSPC write .env.json.partial",
    "EIO rename env.json",
    "EACCES open metrics.jsonl",
    "ENOSPC open samples.jsonl",
)
FIRST_EVALUATION = (
    "ENOSPC open .evaluation.json.partial",
    "EIO write .evaluation.json.partial half",
    "EIO sync .evaluation.json.partial",
    "EROFS rename evaluation.json",
)
UPDATE = (
    "ENOSPC write metrics.jsonl",
    "ENOSPC write metrics.jsonl half",
    "EIO write metrics.jsonl half",
    "EDQUOT write metrics.jsonl",
    "EACCES open samples/.step_2_0.png.partial",
    "ENOSPC open samples/.step_2_0.png.partial",
    "ENOSPC write samples/.step_2_0.png.partial half",
    "EIO sync samples/.step_2_0.png.partial",
    "EPERM rename samples/step_2_0.png",
    "EIO sync samples",
    "ENOSPC write samples.jsonl half",
    "EIO write samples.jsonl",
    "EIO sync metrics.jsonl",
    "EIO sync samples.jsonl",
)
FOR_GOOD = (
    "ENOSPC write metrics.jsonl",
    "EROFS write metrics.jsonl",
    "ENOSPC open samples/.step_2_0.png.partial",
    "EIO write samples.jsonl half",
    "ENOSPC make checkpoints/.step_2.partial",
)
END = (
    "ENOSPC open .evaluation.json.partial",
    "ENOSPC write .evaluation.json.partial half",
    "EIO rename evaluation.json",
    "ENOSPC make .adapter.partial",
    "ENOSPC write .adapter.partial/README.md",
    "EDQUOT open .adapter.partial/adapter_config.json",
    "ENOSPC write .adapter.partial/adapter_config.json half",
    "EACCES open .adapter.partial/generation_config.json",
    "ENOSPC write .adapter.partial/tokenizer.json half",
    "EIO open .adapter.partial/manifest.json",
    "ENOSPC write .adapter.partial/manifest.json half",
    "EIO sync .adapter.partial/adapter_model.safetensors",
    "EIO sync .adapter.partial",
    "EACCES rename adapter",
    "ENOSPC make plots",
    "ENOSPC write plots/.reward.png.partial half",
    "EROFS rename plots/kl.png",
    "ENOSPC open .report.html.partial",
    "EIO write .report.html.partial half",
    "EIO sync .report.html.partial",
    "EACCES rename report.html",
)
FOR_LONGER = (
    "EIO rename .adapter.replaced",
    "ENOSPC rename adapter",
    "EIO sync . #5",
    "EACCES remove .adapter.replaced/*",
    "ENOSPC write .report.html.partial half",
    "EROFS rename config.yaml",
    "EACCES open .lock",
)


def refused(text, for_good=False):
    """The fault that a parameter tells of."""
    name, _, place = text.partition(" ")
    return refuse_at(place, name, for_good)


def in_good_order(outcome):
    """Exit code 4 and one error, said last; no traceback anywhere."""
    assert outcome.code == 4, outcome.err
    assert len(outcome.errors) == 1 and outcome.complaints[-1] == outcome.errors[0], outcome.err
    assert all(line.startswith(("error: ", "warning: ")) for line in outcome.complaints)
    assert "Traceback" not in outcome.out + outcome.err
    assert len(outcome.errors[0].split("; ")) >= 2  # what and why; what to do


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert go(words(directory), directory).code == 0
    return directory


@pytest.fixture(scope="module")
def longer(undisturbed, tmp_path_factory):
    """The same, gone on for one update more."""
    directory = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(undisturbed, directory)
    assert go(again(directory, train__steps=3), directory).code == 0
    return directory


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two updates of which one is done."""
    directory = tmp_path_factory.mktemp("begun") / "run"
    act = refuse_at("write metrics.jsonl #2", "ENOSPC", for_good=True)
    assert go(words(directory), directory, act).code == 4
    assert steps_saved(directory) == 1
    return directory


@pytest.fixture(scope="module")
def all_but_ended(tmp_path_factory):
    """A run whose updates are done and saved, and nothing else."""
    directory = tmp_path_factory.mktemp("ended") / "run"
    act = refuse_at("open .evaluation.json.partial #2", "ENOSPC")
    assert go(words(directory), directory, act).code == 4
    return directory


def goes_on(directory, wanted, **settings):
    """The words that are printed lead to the same end."""
    outcome = go(again(directory, **settings), directory)
    assert outcome.code == 0, outcome.err
    assert left(directory) == left(wanted)


@pytest.mark.parametrize("fault", OPENING)
def test_a_run_that_cannot_begin_leaves_nothing(fault, tmp_path):
    directory = tmp_path / "run"
    in_good_order(go(words(directory), directory, refused(fault)))
    assert not directory.exists()


@pytest.mark.parametrize("fault", FIRST_EVALUATION)
def test_a_fault_in_the_first_evaluation(fault, undisturbed, tmp_path):
    directory = tmp_path / "run"
    in_good_order(go(words(directory), directory, refused(fault)))
    sound(directory)
    assert steps_saved(directory) == 0
    goes_on(directory, undisturbed)


@pytest.mark.parametrize("fault", UPDATE)
def test_a_fault_in_the_loop_saves_the_update_and_its_lines(fault, undisturbed, begun, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(begun, directory)
    in_good_order(go(again(directory), directory, refused(fault)))
    sound(directory)
    assert steps_saved(directory) == 2
    goes_on(directory, undisturbed)


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_a_disk_that_stays_broken_keeps_what_was_saved(fault, undisturbed, begun, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(begun, directory)
    outcome = go(again(directory), directory, refused(fault, for_good=True))
    in_good_order(outcome)
    assert any("what was done since step 1 is lost" in line for line in outcome.complaints)
    sound(directory)
    assert steps_saved(directory) == 1
    goes_on(directory, undisturbed)


@pytest.mark.parametrize("fault", END)
def test_a_fault_at_the_end(fault, undisturbed, all_but_ended, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(all_but_ended, directory)
    in_good_order(go(again(directory), directory, refused(fault)))
    sound(directory)
    assert steps_saved(directory) == 2
    goes_on(directory, undisturbed)


@pytest.mark.parametrize("fault", FOR_LONGER)
def test_a_fault_beside_a_finished_adapter(fault, undisturbed, longer, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    in_good_order(go(again(directory, train__steps=3), directory, refused(fault)))
    sound(directory)
    assert (directory / "adapter").exists() and (directory / "report.html").exists()
    goes_on(directory, longer, train__steps=3)


# ---- a real limit, which binds what is written outside Python too --------------------------------


@pytest.mark.parametrize("kilobytes", [1, 8, 100, 600])
def test_a_file_size_that_the_system_limits(kilobytes, undisturbed, tmp_path):
    directory = tmp_path / "run"
    size = kilobytes * 1024

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    outcome = go(words(directory), directory, prepare=limit)
    in_good_order(outcome)
    if directory.exists():
        sound(directory)
        goes_on(directory, undisturbed)


@pytest.mark.parametrize("kind", ["below a file", "a name that is too long", "a device", "a link"])
def test_a_place_that_cannot_be_a_folder(kind, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    places = {
        "below a file": tmp_path / "file" / "run",
        "a name that is too long": tmp_path / ("n" * 300),
        "a device": "/dev/null/run",
        "a link": tmp_path / "link" / "run",
    }
    outcome = go(words(places[kind]), tmp_path / "run")
    assert outcome.code in (2, 4) and len(outcome.complaints) == 1, outcome.err
    assert outcome.errors
