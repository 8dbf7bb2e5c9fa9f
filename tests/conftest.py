import os
import random

import numpy
import pytest
import torch

SEED = int(os.environ.get("WN_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same seed; pytest shows this line with a failure."""
    print(f"WN_TEST_SEED={SEED}")
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def cuda():
    """The device of tests that are marked `cuda`; they are skipped, with the reason, where our kernels cannot run."""
    from wnkernels._info import cuda_obstacle

    if obstacle := cuda_obstacle():
        pytest.skip(obstacle)
    return torch.device("cuda")
