"""`fastdeberta info`, and why a library is not there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastdeberta import info, libraries

load = libraries.load.__wrapped__  # without the cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are looked for; it has none."""
    monkeypatch.setattr(libraries, "__file__", str(tmp_path / "libraries.py"))
    return tmp_path


def test_the_cuda_library_needs_a_cuda_torch(folder, monkeypatch):
    (folder / "_C_cuda.abi3.so").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "needs a CUDA build of torch, and " + torch.__version__ in load("_C_cuda")


def test_a_library_that_is_not_built(folder, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert load("_C") == (
        "fastdeberta._C is not built (pip install --no-build-isolation fastdeberta)"
    )
    assert "_C_cuda is not built" in load("_C_cuda") and "with nvcc" in load("_C_cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="the words are those of Linux' loader")
def test_a_library_that_does_not_load_says_what_is_wrong_with_it(folder):
    (folder / "_C.abi3.so").write_bytes(b"no library")
    assert load("_C").startswith("fastdeberta._C does not load: ")
    assert "file too short" in load("_C")


@pytest.mark.parametrize(
    "torch_cuda, expected",
    [
        ("13.0", "no GPU (torch is built for CUDA 13.0, but sees none)"),
        (None, "no GPU (torch is not a CUDA build)"),
    ],
)
def test_a_machine_without_a_gpu(monkeypatch, torch_cuda, expected):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    values = info.collect()
    assert values["devices"][0].startswith("cpu (") and values["devices"][1:] == [expected]
    assert expected in info.render(values)


def test_gpus_are_named_with_their_architecture(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    assert info.collect()["devices"][1:] == ["cuda:0 (GPU 0, sm_90)", "cuda:1 (GPU 1, sm_91)"]


def test_the_cuda_library_tells_what_it_was_built_for(monkeypatch):
    library = SimpleNamespace(build_info=lambda: '{"architectures": ["sm_80", "sm_90"]}')
    monkeypatch.setattr(torch.ops, "fastdeberta_C_cuda", library, raising=False)
    real = libraries.load
    monkeypatch.setattr(libraries, "load", lambda name: None if name == "_C_cuda" else real(name))
    values = info.collect()
    assert values["build"]["_C_cuda"] == "loaded"
    assert "architectures: sm_80, sm_90" in info.render(values)
