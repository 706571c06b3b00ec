"""Is this machine ready? Some forty checks (checks.py), each OK, WARN or FAIL with what to do about
it.

    python -m vise_fast.doctor [--run.dir runs]

Exit code 0, or 4 where a check fails. WARN: it runs, but slower or with less. Nothing is
downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vise_fast.config.command_line import Syntax
from vise_fast.doctor import checks
from vise_fast.doctor.checks import Check
from vise_fast.system import console

# distribution, module, oldest version
NEEDED = (
    ("torch", "torch", "2.10"),
    ("transformers", "transformers", "5.0"),
    ("peft", "peft", "0.18"),
    ("safetensors", "safetensors", "0.4"),
    ("tokenizers", "tokenizers", "0.20"),
    ("huggingface_hub", "huggingface_hub", "1.0"),
    ("numpy", "numpy", "1.26"),
    ("pillow", "PIL", "12.3"),
    ("pydantic", "pydantic", "2.5"),
    ("pyyaml", "yaml", "6.0"),
    ("rich", "rich", "13.0"),
    ("matplotlib", "matplotlib", "3.8"),
)
FAULTS = (ImportError, OSError, RuntimeError, AttributeError, ValueError, KeyError, TypeError)
MACHINE = (checks.python, checks.system, checks.encoding, checks.virtual_environment)
LIBRARIES = (
    checks.transformers_range,
    checks.qwen3_vl,
    checks.kernels_folder,
    checks.image_formats,
    checks.torchvision,
)
FAST_PATHS = (
    checks.bitsandbytes,
    checks.flash_attention,
    checks.attention,
    checks.triton,
    checks.native_module,
    checks.kernel_paths,
)
ACCELERATOR = (
    checks.accelerator,
    checks.driver,
    checks.compute_capability,
    checks.bfloat16,
    checks.gpu_memory,
    checks.arithmetic,
)
RESOURCES = (
    checks.cores,
    checks.threads,
    checks.cpu_instructions,
    checks.memory,
    checks.open_files,
)
EMBEDDED = (checks.nano_files, checks.nano_weights, checks.nano_tokenizer)
HUB = (checks.hub_cache, checks.offline, checks.telemetry)
SYNTAX = Syntax(options={"run.dir": "DIRECTORY"})


def examine(run_dir: Path) -> Iterator[Check]:
    """Every finding, in the order a person would mend them."""
    yield from map(_guarded, MACHINE)
    for distribution, module, oldest in NEEDED:
        yield _guarded(lambda: checks.package(distribution, module, oldest), distribution)
    yield from map(_guarded, (*LIBRARIES, *FAST_PATHS, *ACCELERATOR, *RESOURCES))
    yield _guarded(lambda: checks.disk(run_dir), "disk")
    yield _guarded(lambda: checks.writable(run_dir), "run directory")
    yield from map(_guarded, (*EMBEDDED, *HUB))


def main(words: Sequence[str]) -> int:
    """Prints the findings; 4 when one fails."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(__doc__)
        return 0
    found = list(examine(Path(given["run.dir"] or "runs")))
    screen.table(
        "",
        ["check", "", "found"],
        [[check.name, check.status, check.found] for check in found],
        align="left",
    )
    for check in found:
        if check.status != "OK":
            screen.say(f"{check.status} {check.name}: {check.found}; {check.fix}")
    counts = {
        status: sum(check.status == status for check in found) for status in ("OK", "WARN", "FAIL")
    }
    screen.say("  ".join(f"{count} {status}" for status, count in counts.items()))
    return 4 if counts["FAIL"] else 0


def _guarded(check: Callable[[], Check], name: str = "") -> Check:
    """A check that breaks is a finding too: what it looked at is broken."""
    try:
        return check()
    except FAULTS as fault:
        said = " ".join(str(fault).split())[:160]
        return checks.fail(
            name or check.__name__.replace("_", " "),
            f"{type(fault).__name__}: {said}",
            "reinstall it: pip install -e . -c constraints.txt, or make train",
        )


if __name__ == "__main__":
    sys.exit(console.run(main))
