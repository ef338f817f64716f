"""Options of the benchmarks, and what their results say of the machine."""

import ctypes
import os
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastdeberta import available_backends, info

from . import race as races

PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "disentangled-flash")


def pytest_addoption(parser):
    group = parser.getgroup("fastdeberta's benchmarks")
    group.addoption("--long", action="store_true", help="run the cases that take minutes too")
    group.addoption("--alone", action="store_true", help="also time each rival without the others")
    group.addoption(
        "--warm-allocator",
        action="store_true",
        help="let malloc keep freed memory, so that large tensors cost no page faults",
    )


def pytest_configure(config):
    if config.getoption("--warm-allocator"):
        keep_memory()


def keep_memory() -> None:
    """Tells glibc's malloc to never give memory back, and to take it in large pieces."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # Numbers of malloc.h.
    libc = ctypes.CDLL(None)
    for parameter, value in ((trim_threshold, -1), (top_pad, 256 << 20), (mmap_max, 0)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["threads"] = torch.get_num_threads()
    machine_info["warm_allocator"] = config.getoption("--warm-allocator")
    machine_info["versions"] = {name: _version(name) for name in PACKAGES}
    machine_info["fastdeberta"] = info.collect()["build"]
    machine_info["backends"] = available_backends()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _others(benchmark):
    """Notes how many cores other processes kept busy meanwhile: they disturb the figures."""
    start, all_before, ours_before = time.perf_counter(), _busy(), _own()
    yield
    others = (_busy() - all_before) - (_own() - ours_before)
    cores = max(0.0, others / (time.perf_counter() - start))
    benchmark.extra_info["cores_busy_elsewhere"] = round(cores, 2)


def _busy() -> float:
    """CPU seconds of all processes since boot."""
    user, nice, system, _idle, _wait, irq, soft_irq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.fixture
def skip_slow(pytestconfig):
    """skip_slow(True) skips a case that takes minutes, unless --long is given."""

    def skip(slow: bool) -> None:
        if slow and not pytestconfig.getoption("--long"):
            pytest.skip("takes minutes; --long runs it")

    return skip


@pytest.fixture
def race(benchmark, pytestconfig):
    """race.run on this test's `benchmark`."""
    return partial(races.run, benchmark, alone=pytestconfig.getoption("--alone"))
