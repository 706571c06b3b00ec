"""A reward of your own: a box earns something only where both tests speak for it.

    python -m vise_fast.train --reward.plugin examples/reward_plugin.py --reward.name product

The shipped reward adds the two tests up; this one multiplies them, so that doing well in one cannot
make up for failing the other.
"""

import torch

from vise_fast.rewards import register


@register("product")
def product(evidence, parts, config, rng):
    """A reward (N,) for the N sampled boxes, and (N,) bool: is anything known about this one?

    `parts.geometric` (N,): do the boxes in the views agree? `parts.semantic` (N,): is the object
    gone once the box is blurred? `parts.size` (N,): square root of the box's area. `evidence` has
    what they were made from; `config` is the section `reward`; `rng` draws what is random.
    """
    reward = parts.geometric * parts.semantic - config.w_area * parts.size
    reward = torch.where(evidence.readable, reward, -1 - config.w_area)  # no box: the lowest
    return reward, parts.measured | ~evidence.readable
