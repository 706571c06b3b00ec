"""Is this machine ready? Some forty checks (checks.py), each OK, WARN or FAIL with what to do about
it.

    python -m vise_fast.doctor [--run.dir runs]
    python -m vise_fast.doctor --model DIR

With --model: which family a model directory belongs to, and of one that is not known the row one
would have to write.

Exit code 0, or 4 where a check fails. WARN: it runs, but slower or with less. Nothing is
downloaded.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("doctor")  # before what takes seconds to import

import sys
from collections.abc import Sequence
from pathlib import Path

from vise_fast.doctor.checks import examine
from vise_fast.system import console

SYNTAX = commands.syntax("doctor")


def main(words: Sequence[str]) -> int:
    """Prints the findings; 4 when one fails."""
    given = SYNTAX.parse(words)
    screen = console.Console()
    if given.help:
        screen.say(commands.page("doctor", words))
        return 0
    if given["model"] is not None:
        from vise_fast.doctor import family  # needs torch and transformers, which may be missing

        for line in family.lines(given["model"]):
            screen.say(line)
        return 0
    findings = list(examine(Path(given["run.dir"] or "runs")))
    rows = [[finding.name, finding.status, finding.found] for finding in findings]
    screen.table("", ["check", "", "found"], rows, align="left")
    for finding in findings:
        if finding.status != "OK":
            screen.say(f"{finding.status} {finding.name}: {finding.found}; {finding.fix}")
    statuses = [finding.status for finding in findings]
    counts = [f"{statuses.count(status)} {status}" for status in ("OK", "WARN", "FAIL")]
    screen.say("  ".join(counts))
    return 4 if "FAIL" in statuses else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
