"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before
anything imports Triton. No test depends on how fast the machine is: hypothesis sets no deadline.
"""

import os

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
