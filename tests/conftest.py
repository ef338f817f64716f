"""Every test starts from the same random state, and says why it is skipped."""

import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

# Tests of benchmarks/ find it however pytest was started; an installed fastdeberta goes first.
sys.path.append(os.path.dirname(os.path.dirname(__file__)))

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which importing a backend does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastdeberta import available_backends  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def _mend_interpreter() -> None:
    """Three things that Triton's interpreter does not do well.

    It multiplies the bits of bfloat16: it gets the values, which float32 holds exactly. It cuts
    float32 off to make bfloat16, where GPUs round to nearest even. And it prepares triton.language
    anew for every call of a function, which takes a third of the time: once for each launch and
    module is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    create_dot = interpreter.InterpreterBuilder.create_dot
    cast = interpreter.InterpreterBuilder.cast_impl
    launch = interpreter.GridExecutor.__call__
    prepared = set()

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        values = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def mended_dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def mended_cast(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        values = np.ascontiguousarray(source.data, np.float32)
        rounded = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def mended_launch(self, *args, **kwargs):
        prepared.clear()
        return launch(self, *args, **kwargs)

    def mended_call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.InterpreterBuilder.create_dot = mended_dot
    interpreter.InterpreterBuilder.cast_impl = mended_cast
    interpreter.GridExecutor.__call__ = mended_launch
    interpreter.InterpretedFunction.__call__ = mended_call


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
if INTERPRETED:
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
    interpreted = backend == "triton" and INTERPRETED
    return "cuda" if backend in ("triton", "cuda") and not interpreted else "cpu"


def _marks(backend: str):
    if _device(backend) == "cuda":
        return pytest.mark.gpu
    return pytest.mark.interpreted if backend == "triton" else ()


@pytest.fixture(params=[pytest.param(name, marks=_marks(name)) for name in available_backends()])
def backend(request) -> str:
    """Each backend by name; one that cannot be used here skips with its reason."""
    if reason := available_backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    """Where a backend's tensors live; under its interpreter, Triton takes those of the CPU."""
    return _device(backend)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Untrained checkpoints and labelled texts, see finetuned.write_files."""
    from finetuned import write_files

    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def no_report(monkeypatch):
    """Fine-tuning leaves no report.html: plots take longer than tiny runs."""
    monkeypatch.setattr("fastdeberta.finetuning.run.write_report", lambda output: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier of random weights, see predicted.save."""
    from predicted import save

    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def predictor(checkpoint):
    """What predicts with it, in small batches."""
    from fastdeberta.finetuning.predictors import load

    return load(checkpoint, device="cpu", tokens=64)
