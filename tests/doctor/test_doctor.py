"""The doctor: each check on the machine as it is and on machines that lack something; broken
packages are findings, not tracebacks.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 - loaded before versions are faked: it checks them on import

from vise_fast.doctor import __main__ as doctor
from vise_fast.doctor import (
    accelerator,
    checks,
    fast_paths,
    interpreter,
    models,
    packages,
    resources,
)
from vise_fast.doctor.finding import Finding
from vise_fast.system.errors import ConfigError
from vise_fast.system.machine.threads import COUNTS


def sound(finding: Finding) -> bool:
    return (
        finding.status in ("OK", "WARN", "FAIL")
        and bool(finding.name)
        and bool(finding.found)
        and (bool(finding.fix) == (finding.status != "OK"))
    )


def test_there_are_many_checks_and_none_breaks(tmp_path):
    found = list(checks.examine(tmp_path))
    assert len(found) >= 40 and len({finding.name for finding in found}) == len(found)
    assert all(map(sound, found))


@pytest.mark.parametrize("distribution, module, oldest", checks.NEEDED, ids=lambda value: value)
def test_the_packages_here_are_new_enough(distribution, module, oldest):
    assert packages.package(distribution, module, oldest).status == "OK"


def gpu(monkeypatch, **facts):
    """A machine with a card, as far as torch tells."""
    defaults = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda: "Card",
        "get_device_capability": lambda: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda: (70 * 10**9, 80 * 10**9),
    }
    for name, value in (defaults | facts).items():
        monkeypatch.setattr(torch.cuda, name, value)


def absent(monkeypatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in names else real(name)
    )


def broken(monkeypatch, name: str, fault: Exception) -> None:
    real = importlib.import_module

    def load(module: str):
        if module == name:
            raise fault
        return real(module)

    monkeypatch.setattr(importlib, "import_module", load)


# name: (what is wrong, the check, status, what it says)
def asked_for_threads(monkeypatch, number):
    monkeypatch.setenv("OMP_NUM_THREADS", number)
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(number))


def many_threads_on_one_core(monkeypatch):
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)


MACHINES = {
    "old python": (
        lambda m: m.setattr(sys, "version_info", (3, 10, 1)),
        interpreter.python,
        "FAIL",
        "3.11",
    ),
    "another system": (
        lambda m: m.setattr(platform, "system", lambda: "Darwin"),
        interpreter.system,
        "WARN",
        "Linux",
    ),
    "ascii file names": (
        lambda m: m.setattr(sys, "getfilesystemencoding", lambda: "ascii"),
        interpreter.encoding,
        "WARN",
        "UTF-8",
    ),
    "no environment": (
        lambda m: m.setattr(sys, "prefix", sys.base_prefix),
        interpreter.virtual_environment,
        "WARN",
        "venv",
    ),
    "old transformers": (
        lambda m: m.setattr(packages, "version_of", lambda name: (5, 3, 0)),
        packages.transformers_range,
        "WARN",
        "5.17",
    ),
    "new transformers": (
        lambda m: m.setattr(packages, "version_of", lambda name: (6, 0, 0)),
        packages.transformers_range,
        "WARN",
        "5.23",
    ),
    "no jpeg": (
        lambda m: m.setattr("PIL.features.check", lambda name: name != "jpg"),
        packages.image_formats,
        "FAIL",
        "jpg",
    ),
    "no webp": (
        lambda m: m.setattr("PIL.features.check", lambda name: name != "webp"),
        packages.image_formats,
        "WARN",
        "webp",
    ),
    "no bitsandbytes": (
        lambda m: absent(m, "bitsandbytes"),
        fast_paths.bitsandbytes,
        "WARN",
        "pip install bitsandbytes",
    ),
    "bfloat16 attention on an old card": (
        lambda m: gpu(m, get_device_capability=lambda device=None: (7, 5)),
        fast_paths.attention,
        "WARN",
        "7.5",
    ),
    "attention on a card": (
        lambda m: gpu(m, get_device_capability=lambda device=None: (9, 0)),
        fast_paths.attention,
        "OK",
        "FlashAttention",
    ),
    "attention without a card": (
        lambda m: gpu(m, is_available=lambda: False),
        fast_paths.attention,
        "OK",
        "CPU",
    ),
    "no triton, a card": (
        lambda m: [absent(m, "triton"), gpu(m)],
        fast_paths.triton,
        "WARN",
        "pip install triton",
    ),
    "no triton, no card": (
        lambda m: [absent(m, "triton"), gpu(m, is_available=lambda: False)],
        fast_paths.triton,
        "OK",
        "not needed",
    ),
    "no torchvision": (
        lambda m: absent(m, "torchvision"),
        packages.torchvision,
        "OK",
        "not installed",
    ),
    "no flash-attn": (
        lambda m: absent(m, "flash_attn", "flash_attn_interface"),
        fast_paths.flash_attention,
        "OK",
        "torch's own",
    ),
    "not compiled": (
        lambda m: m.setattr("vise_kernels.dispatch.native", lambda: None),
        fast_paths.native_module,
        "WARN",
        "plain",
    ),
    "not compiled, no compiler": (
        lambda m: [
            m.setattr("vise_kernels.dispatch.native", lambda: None),
            m.setattr(shutil, "which", lambda name: None),
        ],
        fast_paths.native_module,
        "WARN",
        "install a C++ compiler",
    ),
    "a card": (gpu, accelerator.accelerator, "OK", "Card"),
    "a card: driver": (gpu, accelerator.driver, "OK", "CUDA"),
    "a card torch cannot use": (
        lambda m: [
            m.setattr(Path, "exists", lambda self: True),
            m.setattr(torch.version, "cuda", "13.0"),
            gpu(m, is_available=lambda: False),
        ],
        accelerator.driver,
        "WARN",
        "update the driver",
    ),
    "a card, torch for CPUs": (
        lambda m: [
            m.setattr(Path, "exists", lambda self: True),
            m.setattr(torch.version, "cuda", None),
            gpu(m, is_available=lambda: False),
        ],
        accelerator.driver,
        "WARN",
        "CPU build",
    ),
    "no card": (
        lambda m: gpu(m, is_available=lambda: False),
        accelerator.accelerator,
        "OK",
        "none",
    ),
    "an old card": (
        lambda m: gpu(m, get_device_capability=lambda: (7, 5)),
        accelerator.compute_capability,
        "WARN",
        "--model.dtype float32",
    ),
    "a new card": (gpu, accelerator.compute_capability, "OK", "9.0"),
    "no bfloat16": (
        lambda m: gpu(m, is_bf16_supported=lambda including_emulation=True: False),
        accelerator.bfloat16,
        "WARN",
        "float32",
    ),
    "bfloat16": (gpu, accelerator.bfloat16, "OK", "GPU"),
    "a busy card": (
        lambda m: gpu(m, mem_get_info=lambda: (10**9, 80 * 10**9)),
        accelerator.gpu_memory,
        "WARN",
        "nvidia-smi",
    ),
    "a free card": (gpu, accelerator.gpu_memory, "OK", "70.0 of 80.0"),
    "wrong products": (
        lambda m: m.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: torch.zeros(128, 128, dtype=a.dtype) + (a.dtype == torch.float32),
        ),
        accelerator.arithmetic,
        "FAIL",
        "off by 1",
    ),
    "products of nan": (
        lambda m: m.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: torch.full((128, 128), float("nan"), dtype=a.dtype),
        ),
        accelerator.arithmetic,
        "FAIL",
        "nan",
    ),
    "one core": (
        lambda m: m.setattr(os, "sched_getaffinity", lambda pid: {0}),
        resources.cores,
        "WARN",
        "twice",
    ),
    "too many threads": (
        lambda m: asked_for_threads(m, "999"),
        resources.threads,
        "WARN",
        "OMP_NUM_THREADS",
    ),
    "threads, and why": (
        lambda m: asked_for_threads(m, "1"),
        resources.threads,
        "OK",
        "1 (OMP_NUM_THREADS=1), waiting: ",
    ),
    "threads are brought down to the cores": (
        many_threads_on_one_core,
        resources.threads,
        "OK",
        "1 (1 core allowed",
    ),
    "an old processor": (
        lambda m: m.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        resources.cpu_instructions,
        "WARN",
        "AVX2",
    ),
    "little memory": (
        lambda m: m.setattr(
            Path, "read_text", lambda self: "MemTotal: 9\nMemAvailable:  1000000 kB\n"
        ),
        resources.memory,
        "WARN",
        "1.0 GB",
    ),
    "few files": (
        lambda m: m.setattr(resource, "getrlimit", lambda kind: (64, 64)),
        resources.open_files,
        "WARN",
        "ulimit",
    ),
    "offline": (
        lambda m: m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        models.offline,
        "OK",
        "offline",
    ),
    "online": (
        lambda m: m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False),
        models.offline,
        "OK",
        "not tried",
    ),
    "a cache that cannot be written": (
        lambda m: m.setattr(os, "access", lambda path, mode: False),
        models.hub_cache,
        "WARN",
        "HF_HOME",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_lacks_is_said(monkeypatch, name):
    change, check, status, part = MACHINES[name]
    with monkeypatch.context() as patch:
        change(patch)
        found = check()
    assert sound(found) and found.status == status and part in f"{found.found}; {found.fix}", found


def test_a_missing_package(monkeypatch):
    absent(monkeypatch, "peft")
    found = packages.package("peft", "peft", "0.18")
    assert (found.status, found.found) == (
        "FAIL",
        "not installed",
    ) and "pip install 'peft>=0.18'" in found.fix


def test_an_old_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10.dev1+cpu")
    found = packages.package("peft", "peft", "0.18")
    assert found.status == "FAIL" and "older than 0.18" in found.found


@pytest.mark.parametrize(
    "version, parts",
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("5.0.0.dev0", (5, 0, 0)),
        ("13.0", (13, 0)),
        ("1.2.3.4", (1, 2, 3)),
    ],
)
def test_versions_are_compared_as_numbers(monkeypatch, version, parts):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert packages.version_of("x") == parts


@pytest.mark.parametrize(
    "name, module, check",
    [
        ("a torchvision for another torch", "torchvision", packages.torchvision),
        ("a bitsandbytes without its library", "bitsandbytes", fast_paths.bitsandbytes),
        ("a flash-attn for another torch", "flash_attn", fast_paths.flash_attention),
        ("a triton that breaks", "triton", fast_paths.triton),
        (
            "transformers without the model",
            "transformers.models.qwen3_vl.modeling_qwen3_vl",
            packages.qwen3_vl,
        ),
        ("a native module for another machine", "vise_kernels.dispatch", fast_paths.native_module),
    ],
)
@pytest.mark.parametrize(
    "fault",
    [
        ImportError("undefined symbol\n_ZN3c10"),
        OSError("libcudart.so.13"),
        RuntimeError("operator torchvision::nms does not exist"),
        AttributeError("x"),
    ],
)
def test_a_broken_package_is_a_finding(monkeypatch, name, module, check, fault):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda wanted: object() if wanted == module else real(wanted),
    )
    broken(monkeypatch, module, fault)
    found = checks.guarded(check)
    assert (
        sound(found)
        and found.status == "FAIL"
        and type(fault).__name__ in found.found
        and "\n" not in found.found
    )


def test_a_kernels_package_in_the_working_directory(monkeypatch, tmp_path):
    assert packages.kernels_folder().status == "OK"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = packages.kernels_folder()
    assert found.status == "FAIL" and "__init__.py" in found.fix


# -- the disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("free, status", [(10**8, "FAIL"), (10**9, "WARN"), (10**11, "OK")])
def test_disk_space(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    found = resources.disk(tmp_path / "not" / "there" / "yet")
    assert sound(found) and found.status == status


def test_the_run_directory_is_tried_and_left_clean(tmp_path):
    assert (
        resources.writable(tmp_path / "runs" / "a").status == "OK"
        and list(tmp_path.iterdir()) == []
    )


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_run_directory_that_refuses(monkeypatch, tmp_path, call, code):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        found = resources.writable(tmp_path)
    assert found.status == "FAIL" and os.strerror(code) in found.found and "--run.dir" in found.fix


# -- the embedded model ----------------------------------------------------------------------------


@pytest.fixture
def nano(monkeypatch, tmp_path) -> Path:
    """A small stand-in for vise_fast/nano."""
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<box>": 0, "?": 1}, '
        '"unk_token": "?"}}'
    )
    monkeypatch.setattr(models, "NANO", tmp_path)
    stamp(tmp_path)
    return tmp_path


def stamp(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(
        subprocess.run(
            ["sha256sum", "model.safetensors"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_a_whole_embedded_model(nano):
    assert [check().status for check in checks.EMBEDDED] == ["OK", "OK", "OK"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_an_embedded_model_with_a_hole(nano, name):
    (nano / name).unlink()
    found = [checks.guarded(check) for check in checks.EMBEDDED]
    assert found[0].status == "FAIL" and name in found[0].found and all(map(sound, found))


def test_damaged_weights(nano):
    data = bytearray((nano / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (nano / "model.safetensors").write_bytes(data)
    assert "differ" in models.nano_weights().found and models.nano_weights().status == "FAIL"


def test_weights_that_are_not_finite(nano):
    from safetensors.torch import save_file

    save_file({"w": torch.tensor([1.0, float("nan")])}, nano / "model.safetensors")
    stamp(nano)
    assert "not finite" in models.nano_weights().found


def test_weights_without_their_sum(nano):
    (nano / "SHA256SUMS").unlink()
    assert models.nano_weights().status == "WARN"


@pytest.mark.parametrize("text", ["", "{}", "garbage"])
def test_a_damaged_tokenizer(nano, text):
    (nano / "tokenizer.json").write_text(text)
    assert checks.guarded(models.nano_tokenizer).status == "FAIL"


def test_a_tokenizer_of_another_model(nano):
    (nano / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}'
    )
    assert "no <box>" in models.nano_tokenizer().found


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statuses, code", [(["OK", "OK"], 0), (["OK", "WARN"], 0), (["WARN", "FAIL", "OK"], 4)]
)
def test_the_exit_code(monkeypatch, capsys, statuses, code):
    found = [
        Finding(f"check {i}", status, "found [this]", "" if status == "OK" else "do that")
        for i, status in enumerate(statuses)
    ]
    monkeypatch.setattr(doctor, "examine", lambda run_dir: iter(found))
    assert doctor.main([]) == code
    said = capsys.readouterr().out
    assert (
        said.count("do that") == sum(status != "OK" for status in statuses)
        and "found [this]" in said
    )
    counts = [f"{statuses.count(status)} {status}" for status in ("OK", "WARN", "FAIL")]
    assert said.splitlines()[-1] == "  ".join(counts)


@pytest.mark.parametrize(
    "words, wanted",
    [([], "runs"), (["--run.dir", "x"], "x"), (["--run.dir=y"], "y"), (["--debug"], "runs")],
)
def test_the_words(monkeypatch, words, wanted):
    examined = []
    monkeypatch.setattr(doctor, "examine", lambda run_dir: examined.append(run_dir) or [])
    assert doctor.main(words) == 0
    assert examined == [Path(wanted)]


@pytest.mark.parametrize(
    "words",
    [["x"], ["--run.dir"], ["--run.dir", "a", "b"], ["--train.steps", "3"], ["--run.dir=a", "b"]],
)
def test_other_words_are_refused(words):
    with pytest.raises(ConfigError, match="--run.dir"):
        doctor.main(words)


def test_nothing_opens_a_socket(monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    assert len(list(checks.examine(tmp_path))) >= 40
