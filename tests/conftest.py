import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings

# A script finds its siblings so.
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

# Each example builds tensors, whose first allocation can take long; the properties themselves are exact.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=400)
settings.load_profile("ci" if os.environ.get("CI") else "default")

# Under xdist the workers share the cores, and so do the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_report_header():
    """Name the families of test_zoo.py whose outputs are compared in this run."""
    from tests.zoo_families import draw_families, read_commit

    commit = read_commit()
    return f"zoo families compared at {commit[:10]}: {', '.join(sorted(draw_families(commit)))}"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state per process, whose mixed precision no later Accelerator may change."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def in_process():
    """Runs the recipe in this process."""
    from tests.recipe_tools import recipe_in_process

    with recipe_in_process() as run:
        yield run


@pytest.fixture(scope="session")
def recipe_server(tmp_path_factory):
    """Starts the recipe in processes that have its imports already."""
    from tests.recipe_tools import RecipeServer

    server = RecipeServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
