"""Comparison against a truth that says by how much it failed: the worst excess over the tolerance,
and where.
"""

import torch


def assert_close(actual, truth, *, absolute, relative=0.0, what=""):
    """|actual - truth| <= absolute + relative |truth| everywhere; `absolute` may be a tensor.

    nan matches nan, inf matches inf.
    """
    actual = actual.double()
    truth = truth.double()
    assert actual.shape == truth.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    excess = torch.where(same, 0.0, (actual - truth).abs() - absolute - relative * truth.abs())
    excess = torch.where(excess.isnan(), torch.inf, excess)
    if excess.numel() and (worst := float(excess.max())) > 0:
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what}: worst excess {worst:.3g} at {where}: {float(actual[where]):.9g}, expected "
            f"{float(truth[where]):.9g}"
        )


def largest_allocation(run):
    """Bytes of the most that one PyTorch operator allocates while `run()` runs on the CPU, and what
    `run` returned.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    return max(event.self_cpu_memory_usage for event in profile.events()), result
