"""What a run says of itself at its start beside the four lines that everybody sees."""

from types import SimpleNamespace

import vise_kernels
from vise_kernels.dispatch import Choice

from vise_fast.run.opening import verbose_lines


def test_those_who_ask_are_told_every_kernel_and_the_attention():
    lines = list(verbose_lines(SimpleNamespace(attention=Choice("plain", "asked for"))))
    ops = vise_kernels.available()
    assert len(lines) == len(ops) + 1 and lines[-1] == "attention plain: asked for"
    for line, (op, (path, reason)) in zip(lines, ops.items(), strict=False):
        assert line == f"kernel   {op}: {path}, {reason}"
