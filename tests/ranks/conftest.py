"""A process that talks to a GPU cannot be forked: its children could not run."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def can_be_forked():
    if torch.cuda.is_initialized():
        pytest.skip("this process talks to a GPU: run tests/ranks by itself")
