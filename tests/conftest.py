import os

import pytest
import torch
from hypothesis import settings

# Each example builds tensors, whose first allocation can take long; the properties themselves are exact.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Under xdist the workers share the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
