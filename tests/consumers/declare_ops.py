"""Makes a torchvision that was built for a GPU import beside a CPU build of torch:

    build/vllm/bin/python tests/consumers/declare_ops.py

Its library does not load there, and its Python then asks after two operators that nobody declared.
Declared, and never called, they do no harm: pictures are resized by torch's own functions.
"""

import importlib.util
import site
from pathlib import Path

DECLARED = """

import torch as _torch

if not _has_ops():
    _declared = _torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main():
    if importlib.util.find_spec("torchvision") is None:
        raise SystemExit("no torchvision here; run it with the environment that vLLM is in")
    (home,) = [Path(place) / "torchvision" for place in site.getsitepackages()[:1]]
    file = home / "extension.py"
    text = file.read_text()
    if "_declared" not in text:
        file.write_text(text + DECLARED)


if __name__ == "__main__":
    main()
