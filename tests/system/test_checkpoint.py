"""Checkpoints: bitwise round trips, refused disks, kills at every system call, every kind of
damage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

from vise_fast.system import checkpoint
from vise_fast.system.checkpoint import (
    Choice,
    Corrupt,
    choose,
    latest,
    load,
    moments,
    restore_moments,
    save,
)
from vise_fast.system.errors import ConfigError, DataError, EnvironmentFault


def tensors(step: int) -> checkpoint.Tensors:
    generator = torch.Generator().manual_seed(step)
    adapter = {
        "a.lora_A.weight": torch.randn(4, 7, generator=generator),
        "a.lora_B.weight": torch.randn(7, 4, generator=generator),
    }
    return {
        "adapter": adapter,
        "optimizer": {
            "a/exp_avg": torch.randn(4, 7, generator=generator),
            "a/step": torch.tensor(float(step)),
        },
    }


def state(step: int) -> dict:
    return {
        "beta": 1e-3 * step + 0.1,
        "baseline": 1 / 3,
        "counters": {"seen": step * 8},
        "notes": ["é", None, True],
    }


def saved(run: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save(run, step, tensors(step), state(step), keep)
    return path


def whole(path: Path, step: int) -> bool:
    got, loop = load(path)
    return loop == state(step) | {"step": step} and all(
        alike(got[group], named) for group, named in tensors(step).items()
    )


def alike(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def present(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# -- the sunny side --------------------------------------------------------------------------------


def test_a_round_trip_is_bitwise(tmp_path):
    path = saved(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step_7" and whole(path, 7)
    assert sorted(os.listdir(path)) == [
        "adapter.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert present(tmp_path) == ["step_7"]
    assert json.loads((path / "manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool]
)
def test_every_dtype_survives(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    got = load(
        save(tmp_path, 1, {"x": {"t": tensor, "scalar": tensor[0, 1], "empty": tensor[:0]}}, {}, 1)
    )[0]["x"]
    assert (
        got["t"].dtype == dtype
        and torch.equal(got["t"], tensor)
        and got["scalar"].shape == ()
        and got["empty"].shape == (0, 4)
    )


def test_special_numbers_survive_bitwise(tmp_path):
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    got = load(save(tmp_path, 1, {"x": {"t": tensor}}, {"lr": 0.1 + 0.2, "big": 2**60}, 1))
    assert torch.equal(got[0]["x"]["t"].view(torch.int32), tensor.view(torch.int32))
    assert got[1]["lr"] == 0.1 + 0.2 and got[1]["big"] == 2**60


def test_views_and_shared_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    got = load(save(tmp_path, 1, {"x": {"a": base, "b": base.T, "c": base[:, 1]}}, {}, 1))[0]["x"]
    assert torch.equal(got["b"], base.T) and torch.equal(got["c"], base[:, 1])


def test_extra_files_are_kept_and_verified(tmp_path):
    (tmp_path / "source.json").write_text('{"r": 16}')
    path = save(tmp_path, 1, tensors(1), {}, 1, {"adapter_config.json": tmp_path / "source.json"})
    assert (path / "adapter_config.json").read_text() == '{"r": 16}'
    (path / "adapter_config.json").write_text('{"r": 17}')
    with pytest.raises(Corrupt, match="adapter_config.json"):
        load(path)


def test_nothing_is_a_pickle(tmp_path):
    for path in saved(tmp_path, 1).iterdir():
        assert path.suffix in (".json", ".safetensors")


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, *range(1, 13), keep=3)
    assert present(tmp_path) == ["step_10", "step_11", "step_12"]
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step_12"  # by number, not by name


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path, 3)
    save(tmp_path, 3, tensors(4), state(4), 3)
    assert torch.equal(
        load(latest(tmp_path))[0]["adapter"]["a.lora_A.weight"],
        tensors(4)["adapter"]["a.lora_A.weight"],
    )
    assert present(tmp_path) == ["step_3"]


def test_a_future_that_a_resume_left_is_removed(tmp_path):
    saved(tmp_path, 10, 20, 30)
    saved(tmp_path, 15)  # resumed from 10
    assert present(tmp_path) == ["step_10", "step_15"] and whole(latest(tmp_path), 15)


# -- resolving -------------------------------------------------------------------------------------


def test_auto_without_a_checkpoint_starts_anew(tmp_path):
    assert choose("auto", tmp_path) == Choice(None, []) == choose("auto", tmp_path / "absent")
    assert latest(tmp_path) is None


def test_a_run_directory_means_its_newest(tmp_path):
    path = saved(tmp_path / "run", 1, 2)
    assert choose(str(tmp_path / "run"), tmp_path / "elsewhere").path == path


def test_a_path_is_taken_as_given(tmp_path):
    saved(tmp_path, 1, 2)
    wanted = tmp_path / "checkpoints" / "step_1"
    assert choose(str(wanted), tmp_path) == Choice(wanted, [])
    moved = tmp_path / "best"
    shutil.copytree(wanted, moved)
    assert whole(choose(str(moved), tmp_path).path, 1)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_no_checkpoint_there(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="no checkpoint at") as caught:
        choose(str(tmp_path / name), tmp_path)
    assert caught.value.code == 2 and "--resume" in str(caught.value)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(Corrupt, match="no whole checkpoint"):
        choose(str(tmp_path), tmp_path)


def test_strangers_in_the_folder_are_ignored(tmp_path):
    saved(tmp_path, 1)
    for name in ("step_x", "step_", "best", "step_2.zip", "step_99 copy"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_50").write_text("a file")
    assert choose("auto", tmp_path) == Choice(tmp_path / "checkpoints" / "step_1", [])


# -- damage ----------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


DAMAGES = {
    "a bit of a tensor": lambda c: flip(c / "adapter.safetensors", -1),
    "a bit of a tensor's name": lambda c: flip(c / "adapter.safetensors", 20),
    "a bit of the moments": lambda c: flip(c / "optimizer.safetensors", -3),
    "a bit of the state": lambda c: flip(c / "state.json", 12),
    "a bit of the manifest's digest": lambda c: flip(
        c / "manifest.json", (c / "manifest.json").read_bytes().index(b"sha256") + 15
    ),
    "tensors cut short": lambda c: os.truncate(c / "adapter.safetensors", 50),
    "tensors of no length": lambda c: os.truncate(c / "adapter.safetensors", 0),
    "state cut short": lambda c: os.truncate(c / "state.json", 5),
    "manifest cut short": lambda c: os.truncate(c / "manifest.json", 40),
    "manifest of no length": lambda c: os.truncate(c / "manifest.json", 0),
    "manifest of zeros": lambda c: (c / "manifest.json").write_bytes(bytes(200)),
    "manifest a list": lambda c: (c / "manifest.json").write_text("[]"),
    "manifest of nothing": lambda c: (c / "manifest.json").write_text("{}"),
    "manifest without files": lambda c: rewrite(c, files={}),
    "manifest with files of another kind": lambda c: rewrite(c, files=["state.json"]),
    "manifest without a step": lambda c: rewrite(c, step=None),
    "manifest leading elsewhere": lambda c: rewrite(
        c,
        files={
            "../../secret": {"bytes": 1, "sha256": ""},
            "state.json": {"bytes": 1, "sha256": ""},
        },
    ),
    "a format to come": lambda c: rewrite(c, format=99),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "no tensors": lambda c: (c / "adapter.safetensors").unlink(),
    "no state": lambda c: (c / "state.json").unlink(),
    "a folder for a file": lambda c: [(c / "state.json").unlink(), (c / "state.json").mkdir()],
    "an empty folder": lambda c: [path.unlink() for path in c.iterdir()],
    "one more byte": lambda c: (c / "adapter.safetensors").open("ab").write(b"x"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_and_passed_over(tmp_path, name):
    good = saved(tmp_path, 1)
    bad = saved(tmp_path, 2)
    DAMAGES[name](bad)
    for attempt in (lambda: load(bad), lambda: choose(str(bad), tmp_path)):
        with pytest.raises(Corrupt) as caught:
            attempt()
        assert (
            caught.value.code == DataError.code == 3
            and "\n" not in str(caught.value)
            and str(bad) in str(caught.value)
        )
    choice = choose("auto", tmp_path)
    assert (
        choice.path == good
        and len(choice.notes) == 1
        and str(bad) in choice.notes[0]
        and whole(choice.path, 1)
    )


# -- crafted: the hashes are right -----------------------------------------------------------------


def sealed(path: Path, **entries: object) -> None:
    """Rewrites the manifest so that sizes and hashes fit; `entries`: more of its files."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(path, files=manifest["files"] | entries)


def instead(name: str, make) -> object:
    """Something else under a file's name."""

    def craft(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return craft


def entry(**changes: object) -> object:
    """An entry of the manifest that says something else of the tensors."""

    def craft(path: Path) -> None:
        files = json.loads((path / "manifest.json").read_text())["files"]
        files["adapter.safetensors"] |= changes
        rewrite(path, files=files)

    return craft


def named(name: str) -> object:
    """An empty file's entry under a name."""
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    return lambda path: sealed(path, **{name: empty})


def written(name: str, content: bytes) -> object:
    def craft(path: Path) -> None:
        (path / name).write_bytes(content)
        sealed(path)

    return craft


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_terabyte(path: Path) -> None:
    """Of no blocks on the disk."""
    path.touch()
    os.truncate(path, 2**40)


SPECIAL = (os.mkfifo, zeros, a_socket, a_loop, a_terabyte, os.mkdir)
CRAFTED = {
    f"{make.__name__} as {name}": instead(name, make)
    for make in SPECIAL
    for name in ("manifest.json", "state.json", "adapter.safetensors")
} | {
    "a manifest of brackets": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "a manifest without end": lambda c: os.truncate(c / "manifest.json", 2**21),
    "a step that is true": lambda c: rewrite(c, step=True),
    "a step of 5000 digits": lambda c: (c / "manifest.json").write_text(
        '{"format": 1, "step": ' + "9" * 5000 + "}"
    ),
    "a size that is true": entry(bytes=True),
    "a size below zero": entry(bytes=-1),
    "a size in words": entry(bytes="many"),
    "a size without end": entry(bytes=2**63),
    "a sum that is a list": entry(sha256=["0"] * 64),
    "a sum that is nothing": entry(sha256=None),
    "a NUL in a name": named("state\0.json"),
    "no name": named(""),
    "a name that is the folder": named("."),
    "a name that is the folder above": named(".."),
    "a name from the root": named("/etc/hostname"),
    "a name of 300 letters": named("n" * 300),
    "a name of half a letter": named("\ud800"),
    "a name of two lines": named("a\nb"),
}
CONTENT = {
    "a state of brackets": written("state.json", b"[" * 100_000),
    "a state that is a list": written("state.json", b"[]"),
    "a state that is a number": written("state.json", b"3"),
    "a state that is no text": written("state.json", b"\xff\xfe"),
    "a state without a step": written("state.json", b"{}"),
    "a step that is no number": written("state.json", b'{"step": NaN}'),
    "a step below zero in the state": written("state.json", b'{"step": -1}'),
    "the step of another": written("state.json", b'{"step": 1}'),
    "a step of 5000 digits in the state": written("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
    "no tensors at all": written("adapter.safetensors", b""),
    "a header of brackets": written("adapter.safetensors", b"\0\x10\0\0\0\0\0\0" + b"[" * 4096),
    "a header without end": written("adapter.safetensors", b"\xff" * 64),
    "a tensor of nobody's type": written(
        "adapter.safetensors",
        b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}'.ljust(72)
        + b"1234",
    ),
    "a pickle": written("adapter.safetensors", b"\x80\x04N."),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_what_no_save_makes_is_passed_over(tmp_path, monkeypatch, name):
    """Nothing waits, nothing is read without end."""
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    good = saved(tmp_path, 1)
    bad = saved(tmp_path, 2)
    CRAFTED[name](bad)
    for attempt in (lambda: load(bad), lambda: choose(str(bad), tmp_path)):
        with pytest.raises(Corrupt) as caught:
            attempt()
        assert "\n" not in str(caught.value) and str(bad) in str(caught.value)
    choice = choose("auto", tmp_path)
    assert choice.path == good and len(choice.notes) == 1


GIB = 2**30
SUM = hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    "name, size, sha256, fits",
    [
        ("a.safetensors", 64 * GIB, SUM, True),
        ("a.safetensors", 64 * GIB + 1, SUM, False),
        ("state.json", checkpoint.files.LARGEST_JSON, SUM, True),
        ("state.json", checkpoint.files.LARGEST_JSON + 1, SUM, False),
        ("state.json", 0, SUM, True),
        ("state.json", -1, SUM, False),
        ("state.json", True, SUM, False),
        ("state.json", 5.0, SUM, False),
        ("state.json", 5, SUM[1:], False),
        ("state.json", 5, SUM + "0", False),
        ("state.json", 5, SUM.upper(), False),
        ("state.json", 5, "", False),
    ],
)
def test_an_entry_is_believed_up_to_its_limits(name, size, sha256, fits):
    assert checkpoint._described(name, {"bytes": size, "sha256": sha256}) == fits


def test_a_manifest_may_be_a_megabyte(tmp_path):
    """Blanks behind it change nothing, up to there."""
    path = saved(tmp_path, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.ljust(2**20))
    assert whole(path, 1)
    (path / "manifest.json").write_text(text.ljust(2**20 + 1))
    with pytest.raises(Corrupt, match="manifest.json"):
        load(path)


@pytest.mark.parametrize("name", CONTENT)
def test_a_content_that_no_save_makes_is_refused(tmp_path, name):
    bad = saved(tmp_path, 2)
    CONTENT[name](bad)
    with pytest.raises(Corrupt) as caught:
        load(bad)
    assert "\n" not in str(caught.value) and str(bad) in str(caught.value)


def test_what_could_be_fallen_back_to(tmp_path):
    older = [saved(tmp_path, step) for step in (1, 2)]
    newest = saved(tmp_path, 3)
    assert choose("auto", tmp_path) == Choice(newest, [], tuple(reversed(older)))


def test_a_judge_has_the_last_word(tmp_path):
    good = saved(tmp_path, 1)
    bad = saved(tmp_path, 2)

    def judge(path: Path) -> None:
        if path == bad:
            raise Corrupt("not this one; not at all")

    assert choose("auto", tmp_path, judge) == Choice(good, ["not this one"])
    with pytest.raises(Corrupt, match="not this one"):
        choose(str(bad), tmp_path, judge)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json"])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 200])
def test_a_file_that_is_what_was_hashed_and_yet_no_such_file(tmp_path, name, data):
    """Its manifest is right; what it holds cannot be read."""
    path = saved(tmp_path, 1)
    (path / name).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(path, files=files)
    with pytest.raises(Corrupt, match="is damaged"):
        load(path)


def test_no_good_one_is_an_error_not_a_new_start(tmp_path):
    for step in (1, 2):
        DAMAGES["a bit of a tensor"](saved(tmp_path, step))
    with pytest.raises(
        Corrupt, match=r"no checkpoint under .* is whole \(the checkpoint \S*step_2 "
    ):
        choose("auto", tmp_path)


def test_a_run_goes_on_after_a_damaged_checkpoint(tmp_path):
    saved(tmp_path, 10, 20)
    DAMAGES["a bit of a tensor"](tmp_path / "checkpoints" / "step_20")
    saved(tmp_path, 20, keep=2)  # written anew
    assert whole(latest(tmp_path), 20) and present(tmp_path) == ["step_10", "step_20"]


def test_states_that_json_has_no_word_for_are_refused(tmp_path):
    saved(tmp_path, 1)
    with pytest.raises(ValueError):
        save(tmp_path, 2, tensors(2), {"beta": float("nan")}, 3)
    assert whole(latest(tmp_path), 1)


# -- refusing disks --------------------------------------------------------------------------------

CALLS = [(os, "fsync"), (os, "rename"), (os, "open"), (os, "mkdir")]


def refusing(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, turn: int, fault: BaseException
) -> list[int]:
    """From its `turn`-th call on, `owner.name` raises `fault`; returns a counter of calls."""
    real = getattr(owner, name)
    calls = [0]

    def call(*args, **options):
        calls[0] += 1
        if calls[0] > turn:
            raise fault
        return real(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize(
    "owner, name", CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("turn", [0, 1, 2, 4])
def test_a_refusing_disk_leaves_the_old_one(tmp_path, monkeypatch, owner, name, code, turn):
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        calls = refusing(patch, owner, name, turn, OSError(code, os.strerror(code)))
        refused = None
        try:
            saved(tmp_path, 2)
        except EnvironmentFault as fault:
            refused = fault
    assert (refused is not None) == (calls[0] > turn)
    if refused is not None:
        assert refused.code == 4 and os.strerror(code) in str(refused) and "\n" not in str(refused)
    choice = choose("auto", tmp_path)
    assert whole(choice.path, int(choice.path.name.split("_")[1])) and choice.notes == []
    saved(tmp_path, 3)  # the disk is well again
    assert (
        whole(latest(tmp_path), 3)
        and present(tmp_path)[-1] == "step_3"
        and not any(name.startswith(".") for name in present(tmp_path))
    )


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("again", [1, 2])
def test_a_refusing_disk_leaves_one_of_a_step_that_is_saved_again(
    tmp_path, monkeypatch, turn, again
):
    """Twice in a row, at any rename: a whole one is there at every moment."""
    saved(tmp_path, 5)
    for allowed in (turn, again):
        with monkeypatch.context() as patch:
            fault = OSError(errno.EIO, os.strerror(errno.EIO))
            calls = refusing(patch, os, "rename", allowed, fault)
            with contextlib.suppress(EnvironmentFault):
                saved(tmp_path, 5)
        assert calls[0] > 0 and whole(latest(tmp_path), 5)
    saved(tmp_path, 5)
    assert whole(latest(tmp_path), 5) and present(tmp_path) == ["step_5"]


def test_a_full_disk_frees_what_it_took(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(EnvironmentFault):
        refusing(patch, os, "fsync", 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        saved(tmp_path, 2)
    assert present(tmp_path) == ["step_1"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault, match="--run.dir"):
        saved(tmp_path / "file", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("x")
    with pytest.raises(EnvironmentFault, match="--run.dir"):
        saved(tmp_path / "run", 1)


# -- kills -----------------------------------------------------------------------------------------

WATCHED = [
    (os, "fsync"),
    (os, "rename"),
    (os, "open"),
    (os, "mkdir"),
    (os, "unlink"),
    (os, "rmdir"),
    (shutil, "rmtree"),
    (checkpoint, "_write"),
]


def killed_at(turn: int, work) -> bool:
    """Runs `work` in a child that SIGKILLs itself right before its `turn`-th watched call; False
    when it finished first.
    """
    child = os.fork()
    if child == 0:
        calls = 0

        def watch(real):
            def call(*args, **options):
                nonlocal calls
                calls += 1
                if calls == turn:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)

            return call

        for owner, name in WATCHED:
            setattr(owner, name, watch(getattr(owner, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_everywhere(tmp_path: Path, prepare, work, acceptable: set[int]) -> int:
    """Kills `work` at every watched call in turn; after each the newest good checkpoint is whole
    and one of `acceptable`.
    """
    for turn in range(1, 200):
        run = tmp_path / str(turn)
        prepare(run)
        died = killed_at(turn, partial(work, run))
        choice = choose("auto", run)
        step = int(choice.path.name.removesuffix(".replaced").split("_")[1])
        assert step in acceptable and choice.notes == [], (turn, choice)
        assert load(choice.path)[1]["step"] == step and whole(choice.path, step), turn
        saved(run, 90)
        left = present(run)
        assert whole(latest(run), 90) and not any(name.startswith(".") for name in left), turn
        assert not {
            name.removesuffix(".replaced") for name in left if name.endswith(".replaced")
        } & set(left), turn
        if not died:
            return turn - 1
    raise AssertionError("never finished")


def test_a_kill_at_any_point_of_a_save(tmp_path):
    points = kill_everywhere(
        tmp_path, lambda run: saved(run, 1, 2), lambda run: saved(run, 3, keep=2), {2, 3}
    )
    assert points >= 20


def test_a_kill_at_any_point_of_the_first_save(tmp_path):
    for turn in range(1, 40):
        run = tmp_path / str(turn)
        died = killed_at(turn, partial(saved, run, 1))
        path = latest(run)
        assert path is None or whole(path, 1)
        assert whole(saved(run, 1), 1) and present(run) == ["step_1"]
        if not died:
            assert turn > 12
            return


def test_a_kill_at_any_point_of_saving_a_step_again(tmp_path):
    """The only checkpoint is being replaced: there is no moment without one."""
    points = kill_everywhere(tmp_path, lambda run: saved(run, 5), lambda run: saved(run, 5), {5})
    assert points >= 16


def test_a_kill_while_abandoned_steps_are_removed(tmp_path):
    points = kill_everywhere(
        tmp_path, lambda run: saved(run, 10, 20, 30), lambda run: saved(run, 15), {10, 15, 20, 30}
    )
    assert points >= 20


# -- the optimizer ---------------------------------------------------------------------------------


def trained(
    steps: int, seed: int = 0
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    named = {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.randn(5))}
    optimizer = torch.optim.AdamW(named.values(), lr=0.1)
    for step in range(steps):
        advance(named, optimizer, step)
    return named, optimizer


def advance(
    named: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> None:
    optimizer.zero_grad()
    sum(((parameter - step) ** 2).sum() for parameter in named.values()).backward()
    optimizer.step()


def test_moments_come_back_bit_for_bit(tmp_path):
    named, optimizer = trained(4)
    values, numbers = moments(optimizer, named)
    path = save(
        tmp_path, 4, {"adapter": dict(named), "optimizer": values}, {"optimizer": numbers}, 1
    )
    fresh, other = trained(0, seed=1)
    groups, loop = load(path)
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(groups["adapter"][name])
    restore_moments(other, fresh, groups["optimizer"], loop["optimizer"])
    for step in range(4, 9):
        advance(named, optimizer, step)
        advance(fresh, other, step)
    assert all(torch.equal(named[name], fresh[name]) for name in named)


def test_moments_of_an_optimizer_that_counts_in_python(tmp_path):
    named, optimizer = trained(1)
    for parameter in named.values():
        optimizer.state[parameter]["step"] = 1  # as bitsandbytes does
    values, numbers = moments(optimizer, named)
    assert numbers == {"a/step": 1, "b/step": 1} and "a/step" not in values
    fresh, other = trained(0)
    restore_moments(other, fresh, values, numbers)
    assert other.state[fresh["a"]]["step"] == 1


def test_moments_of_other_parameters_are_refused():
    named, optimizer = trained(1)
    values, numbers = moments(optimizer, named)
    with pytest.raises(Corrupt, match="not trained here"):
        restore_moments(optimizer, {"a": named["a"]}, values, numbers)


@pytest.mark.parametrize(
    "step, is_count",
    [
        (0, True),
        (7, True),
        (7.0, True),
        (2**53 - 1, True),
        (2**53, False),
        (-1, False),
        ("7", False),
        (None, False),
        (math.nan, False),
        (torch.tensor(7.0), True),
        (torch.tensor([7]), True),
        (torch.tensor(-1.0), False),
        (torch.tensor([7.0, 7.0]), False),
        (torch.tensor([]), False),
    ],
)
def test_a_number_of_steps_is_one_plain_number(step, is_count):
    assert checkpoint._counts(step) == is_count


def test_adamws_counter_stays_on_the_cpu_and_its_moments_follow_the_parameter():
    """On the device that stands for any other: `meta` holds no numbers."""
    named, optimizer = trained(1)
    values, numbers = moments(optimizer, named)
    away = {name: torch.nn.Parameter(p.detach().to("meta")) for name, p in named.items()}
    other = torch.optim.AdamW(away.values(), lr=0.1)
    restore_moments(other, away, values, numbers)
    for parameter in away.values():
        kept = other.state[parameter]
        assert kept["step"].device.type == "cpu" and kept["step"] == 1
        assert kept["exp_avg"].device.type == kept["exp_avg_sq"].device.type == "meta"


def halved(values: dict, numbers: dict) -> None:
    values["a/exp_avg"] = values["a/exp_avg"].half()


IMPOSSIBLE = {
    "of another shape": lambda v, n: v.update({"a/exp_avg": torch.zeros(4, 3)}),
    "without an entry": lambda v, n: v.pop("b/exp_avg_sq"),
    "of another type": halved,
    "not finite": lambda v, n: v["b/exp_avg"].fill_(float("nan")),
    "negative": lambda v, n: v["b/exp_avg_sq"].fill_(-1),
    "without a step": lambda v, n: v.pop("a/step"),
    "after steps in words": lambda v, n: (v.pop("a/step"), n.update({"a/step": "four"})),
    "after a list of steps": lambda v, n: v.update({"a/step": torch.zeros(2)}),
    "with a number for a tensor": lambda v, n: (v.pop("a/exp_avg"), n.update({"a/exp_avg": 1.0})),
    "with more than it keeps": lambda v, n: v.update({"a/extra": torch.zeros(1)}),
    "in eight bits": lambda v, n: v.update({"a/state1": torch.zeros(3, 4, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_moments_that_cannot_be_are_refused_and_nothing_changes(name):
    named, optimizer = trained(1)
    values, numbers = moments(optimizer, named)
    values = {entry: value.clone() for entry, value in values.items()}
    IMPOSSIBLE[name](values, numbers)
    fresh, other = trained(0)
    with pytest.raises(Corrupt, match="optimizer state for"):
        restore_moments(other, fresh, values, numbers)
    assert not other.state


EIGHT_BITS = {
    "fewer scales": lambda v: v.update({"a/absmax1": v["a/absmax1"][:-1]}),
    "fewer codes": lambda v: v.update({"a/qmap2": v["a/qmap2"][:5]}),
    "fewer moments": lambda v: v.update({"a/state2": v["a/state2"][:-1]}),
    "no scales": lambda v: v.pop("a/absmax2"),
    "scales not a number": lambda v: v["a/absmax1"].fill_(float("nan")),
    "moments of whole numbers": lambda v: v.update({"a/state1": v["a/state1"].int()}),
}


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_moments_in_eight_bits_that_native_code_would_read_past_are_refused(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    named = {"a": torch.nn.Parameter(torch.randn(128, 64))}
    optimizer = bitsandbytes.optim.AdamW8bit(named.values(), lr=0.01)
    advance(named, optimizer, 0)
    values, numbers = moments(optimizer, named)
    values = {entry: value.clone() for entry, value in values.items()}
    EIGHT_BITS[name](values)
    fresh = bitsandbytes.optim.AdamW8bit(named.values(), lr=0.01)
    with pytest.raises(Corrupt, match="optimizer state for"):
        restore_moments(fresh, named, values, numbers)


def test_an_optimizer_that_never_stepped_has_no_state():
    named, optimizer = trained(0)
    assert moments(optimizer, named) == ({}, {})


def test_moments_in_eight_bits_come_back_bit_for_bit(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def begun(seed: int) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        named = {
            "a": torch.nn.Parameter(torch.randn(128, 64)),
            "small": torch.nn.Parameter(torch.randn(5)),
        }
        return named, bitsandbytes.optim.AdamW8bit(named.values(), lr=0.01)

    named, optimizer = begun(0)
    for step in range(3):
        advance(named, optimizer, step)
    values, numbers = moments(optimizer, named)
    assert values["a/state1"].dtype == torch.uint8
    groups, loop = load(
        save(tmp_path, 3, {"adapter": dict(named), "optimizer": values}, {"optimizer": numbers}, 1)
    )
    fresh, other = begun(1)
    with torch.no_grad():
        for name, parameter in fresh.items():
            parameter.copy_(groups["adapter"][name])
    restore_moments(other, fresh, groups["optimizer"], loop["optimizer"])
    for step in range(3, 6):
        advance(named, optimizer, step)
        advance(fresh, other, step)
    assert all(torch.equal(named[name], fresh[name]) for name in named)
