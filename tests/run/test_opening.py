"""What a run says of itself at its start beside the four lines that everybody sees."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import vise_kernels
from PIL import Image as Pillow
from vise_kernels.dispatch import Choice

from vise_fast.config.schema import load
from vise_fast.images.drawn import Scenes
from vise_fast.images.sources import open_source
from vise_fast.run.opening import few_pictures, verbose_lines


def test_those_who_ask_are_told_every_kernel_and_the_attention():
    lines = list(verbose_lines(SimpleNamespace(attention=Choice("plain", "asked for"))))
    ops = vise_kernels.available()
    assert len(lines) == len(ops) + 1 and lines[-1] == "attention plain: asked for"
    for line, (op, (path, reason)) in zip(lines, ops.items(), strict=False):
        assert line == f"kernel   {op}: {path}, {reason}"


@pytest.mark.parametrize("batch, told", [(3, []), (4, ["data     3 pictures for updates of 4"])])
def test_fewer_pictures_than_an_update_takes_are_told(tmp_path, batch, told):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        Pillow.new("RGB", (64, 64), (60 * n, 9, 99)).save(folder / f"{n}.png")
    words = ["--data.dir", str(folder), "--data.holdout", "0", "--train.batch", str(batch)]
    config = load(None, [*words, "--data.min_pixels", "256"])
    with closing(open_source(config, 32)) as source:
        lines = list(few_pictures(config, source))
    assert [line.split(":")[0] for line in lines] == told
    assert list(few_pictures(load(None, ["--train.batch", "999"]), Scenes(load(None, [])))) == []
