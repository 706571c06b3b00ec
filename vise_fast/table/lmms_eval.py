"""lmms-eval as a program: the command for one task and one model directory, and what it leaves.

It runs in an environment of its own (tests/consumers/requirements.txt pins one), because it needs
another torch than the trainer. Left out: which tasks make a table (rows.py).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vise_fast.system.errors import DataError, EnvironmentFault

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Setting:
    """How lmms-eval asks: on which device, pixel limits, the system prompt (its own default is "You
    are a helpful assistant.", Qwen3-VL has none), questions per task at most (None: all).
    """

    device: str
    min_pixels: int
    max_pixels: int
    system_prompt: str = ""
    limit: int | None = None


def command(
    python: str,
    model: Path,
    task: str,
    out: Path,
    setting: Setting,
    include: Path | None = None,
) -> list[str]:
    """The words that run one task on one model directory."""
    arguments = {
        "pretrained": str(model),
        "device": setting.device,
        "device_map": setting.device,
        "attn_implementation": "sdpa",
        "min_pixels": str(setting.min_pixels),
        "max_pixels": str(setting.max_pixels),
        "system_prompt": setting.system_prompt,
    }
    words = [python, "-m", "lmms_eval", "--model", "qwen3_vl", "--tasks", task]
    words += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    words += ["--batch_size", "1", "--log_samples", "--output_path", str(out)]
    if setting.limit is not None:
        words += ["--limit", str(setting.limit)]
    if include is not None:
        words += ["--include_path", str(include)]
    return words


def run(words: Sequence[str], log: Path, offline: bool) -> None:
    """Runs it; what it says goes to `log`. Raises EnvironmentFault where it ends in a fault."""
    env = os.environ | (OFFLINE if offline else {})
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
        except OSError as fault:
            raise EnvironmentFault(
                f"lmms-eval cannot be run as {words[0]}: {fault.strerror}; name its "
                "environment with --env DIR"
            ) from fault
    if code != 0:
        raise EnvironmentFault(
            f"lmms-eval ended with code {code}; what it said is in {log}; correct that and start "
            "again: finished tasks are kept"
        )


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    """The logged samples of a task, by their number in the data. Raises DataError."""
    found = sorted(out.rglob(f"*_samples_{task}.jsonl"))
    if not found:
        raise DataError(
            f"{out} has no samples of {task}; lmms-eval did not finish it; delete the folder and "
            "start again"
        )
    rows = [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["doc_id"]))


def answer(sample: dict[str, Any]) -> str:
    """What the model said."""
    said = sample["filtered_resps"]
    return said[0] if isinstance(said, list) else str(said)
