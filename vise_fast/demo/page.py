"""The demo's page, made with gradio: a picture, what to look for, how strong the adapter; base and
adapter side by side.

Nothing leaves the machine: the page is served on loopback, and gradio's own reports are off. Left
out: what is answered (trial.py).
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from PIL import Image as Pillow

from vise_fast.demo.trial import Bench, Trial, try_out
from vise_fast.evaluate.strengths import FURTHEST
from vise_fast.images import scenes
from vise_fast.system.errors import EnvironmentFault
from vise_fast.system.randomness import generator

TITLE = "vise_fast: where is it?"
EXAMPLES = 6


def gradio() -> ModuleType:
    """The library, imported on first use. Raises EnvironmentFault where it is missing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return importlib.import_module("gradio")
    except ImportError as fault:
        raise EnvironmentFault(
            f"the demo's page needs gradio ({fault}); pip install 'gradio>=5', or use vise-fast "
            "infer"
        ) from None


def examples(size: int) -> list[Pillow.Image]:
    """Drawn scenes to begin with, always the same; none of them is trained or measured on."""
    drawn = [scenes.draw(generator(0, n, "demo scene"), size=size) for n in range(EXAMPLES)]
    return [Pillow.fromarray(scene.pixels) for scene in drawn]


def shown(trial: Trial) -> list[Any]:
    """A trial in the order of the page's fields."""
    pictures = [(view, "expected: white") for view in trial.views]
    if trial.ghost is not None:
        pictures.insert(0, (trial.ghost, "the box hidden"))
    return [trial.picture, trial.said, pictures, trial.heat]


def build(bench: Bench) -> Any:
    """The page as gradio's Blocks."""
    gr = gradio()

    def ask(picture: Pillow.Image | None, query: str, alpha: float) -> list[Any]:
        if picture is None:
            raise gr.Error("first give a picture")
        base, adapter = try_out(bench, picture, query.strip(), alpha)
        return [*shown(base), *shown(adapter)]

    with gr.Blocks(title=TITLE) as page:
        gr.Markdown(f"# {TITLE}\n{_about(bench)}")
        with gr.Row():
            picture = gr.Image(type="pil", label="picture", height=280)
            with gr.Column():
                query = gr.Textbox(label="what to look for; empty: the base names something")
                alpha = gr.Slider(
                    0, FURTHEST / 2, value=1, step=0.1, label="strength of the adapter"
                )
                go = gr.Button("Look", variant="primary")
        gr.Examples([[image] for image in examples(bench.config.scenes.size)], [picture])
        with gr.Row():
            fields = [field for name in ("base", "adapter") for field in _column(gr, name)]
        go.click(ask, [picture, query, alpha], fields, api_name="look")
    return page


def _column(gr: ModuleType, name: str) -> list[Any]:
    """One arm's fields, in the order of `shown`."""
    with gr.Column():
        return [
            gr.Image(type="pil", label=f"{name}: the box", height=280),
            gr.Textbox(label=f"{name}: what it says", lines=4),
            gr.Gallery(label=f"{name}: ghost and views", columns=3, height=200),
            gr.Image(type="pil", label=f"{name}: where it looked", height=200),
        ]


def _about(bench: Bench) -> str:
    model = bench.config.model.path
    if not bench.adapter:
        return f"{model} without an adapter: both sides are the base."
    return f"{model}, the base beside its adapter. Nothing leaves this machine."
