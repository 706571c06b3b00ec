"""A view and a prompt style of your own: pictures upside down, and another way to ask for a box.

    python -m vise_fast.train --run.plugins examples/view_plugin.py --view.kinds affine,upside_down

A view is an affine matrix, source pixels to view pixels; warping, boxes and rewards follow from it.
A style is the texts of the three questions; what it does not say is as in `natural`. Answers are
read by the same parsers whatever the style.
"""

from dataclasses import replace

import torch

from vise_fast.images import views
from vise_fast.text import styles
from vise_fast.text.prompts import SHORT


def upside_down(rng, height, width, settings):
    """(3, 3) float64; `rng` draws what is random, `settings` is the section `view`."""
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = -1.0
    matrix[1, 2] = height
    return matrix


views.register("upside_down", upside_down)
styles.register(replace(SHORT, name="whereabouts", ground_text="find {query} ?"))
