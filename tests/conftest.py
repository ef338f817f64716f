"""Every test starts from the same random state, and says why it is skipped."""

import os

import numpy as np
import pytest
import torch

from fastdeberta import available_backends

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(params=available_backends())
def backend(request) -> str:
    """Each backend by name; one that cannot be used here skips with its reason."""
    if reason := available_backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where a backend's tensors live; under its interpreter, Triton takes those of the CPU."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if backend in ("triton", "cuda") and not interpreted else "cpu"
