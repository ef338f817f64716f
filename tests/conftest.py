"""Every test starts from the same random state, and says why it is skipped."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which importing a backend does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastdeberta import available_backends  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def _mend_interpreter() -> None:
    """Triton's interpreter multiplies the bits of bfloat16: give it the values, which float32
    holds exactly."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = mended


_mend_interpreter()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        # A backend that is not there gives its own reason.
        if "gpu" in item.keywords and "backend" not in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


def _device(backend: str) -> str:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if backend in ("triton", "cuda") and not interpreted else "cpu"


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu if _device(name) == "cuda" else ())
        for name in available_backends()
    ]
)
def backend(request) -> str:
    """Each backend by name; one that cannot be used here skips with its reason."""
    if reason := available_backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where a backend's tensors live; under its interpreter, Triton takes those of the CPU."""
    return _device(backend)
