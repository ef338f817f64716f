"""Options of the benchmarks, and what their results say of the machine."""

import ctypes
import gc
import os
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastdeberta import available_backends, info

from . import race as races
from . import report

PACKAGES = {
    "cpu": ("torch", "transformers", "onnxruntime", "openvino", "disentangled-flash"),
    "cuda": ("torch", "triton", "transformers", "disentangled-flash", "flashdeberta"),
}


def pytest_addoption(parser):
    group = parser.getgroup("fastdeberta's benchmarks")
    group.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where everything runs, on what shapes and against which rivals; default: a GPU",
    )
    group.addoption("--backend", default="auto", help="the backend of ours; default: auto")
    group.addoption(
        "--minutes",
        type=float,
        help="start no case later than this; default: 5 on a GPU, where compiling takes the time",
    )
    group.addoption("--long", action="store_true", help="run the cases that take minutes too")
    group.addoption("--alone", action="store_true", help="also time each rival without the others")
    group.addoption(
        "--warm-allocator",
        action="store_true",
        help="let malloc keep freed memory, so that large tensors cost no page faults",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cases(names, values): parametrizes by the values that values(device) gives"
    )
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    if config.getoption("--warm-allocator"):
        keep_memory()


def keep_memory() -> None:
    """Tells glibc's malloc to never give memory back, and to take it in large pieces."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # Numbers of malloc.h.
    libc = ctypes.CDLL(None)
    for parameter, value in ((trim_threshold, -1), (top_pad, 256 << 20), (mmap_max, 0)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")


def pytest_generate_tests(metafunc):
    for mark in metafunc.definition.iter_markers("cases"):
        names, values = mark.args
        found = values(metafunc.config.getoption("--device"))
        ids = ["-".join(map(_id, value if "," in names else [value])) for value in found]
        metafunc.parametrize(names, found, ids=ids)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        # What repeats the rest in another dtype comes last, in the time that is left.
        items.sort(key=lambda item: item.name.endswith(("-fp16]", "-fp32]")))


def _id(value) -> str:
    return value if isinstance(value, str) else value.id


def pytest_benchmark_update_machine_info(config, machine_info):
    device = config.getoption("--device")
    if device == "cuda":
        machine_info["device"] = _gpu()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["warm_allocator"] = config.getoption("--warm-allocator")
    machine_info["versions"] = {name: _version(name) for name in PACKAGES[device]}
    machine_info["fastdeberta"] = info.collect()["build"]
    machine_info["backends"] = available_backends()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    kind = f"sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors"
    return f"{found.name} ({kind}, {memory}), CUDA {torch.version.cuda}"


@pytest.hookimpl(trylast=True)  # After the tables of pytest-benchmark.
def pytest_terminal_summary(terminalreporter, config):
    """Attention's times and memory as one short table."""
    session = getattr(config, "_benchmarksession", None)
    done = [
        {"group": b.group, "param": b.param, "extra_info": b.extra_info}
        for b in (session.benchmarks if session else [])
        if b.name.startswith(("test_attention[", "test_memory[")) and "values" in b.extra_info
    ]
    if done:
        terminalreporter.section("ours, and each rival as a multiple: above 1, ours is better")
        for line in report.short(done):
            terminalreporter.write_line(line)


@pytest.fixture
def device(pytestconfig) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture
def backend(pytestconfig) -> str:
    return pytestconfig.getoption("--backend")


@pytest.fixture(scope="session")
def _end(pytestconfig) -> float:
    minutes = pytestconfig.getoption("--minutes")
    if minutes is None:
        minutes = 5 if pytestconfig.getoption("--device") == "cuda" else float("inf")
    return time.monotonic() + 60 * minutes


@pytest.fixture(autouse=True)
def _in_time(_end):
    if time.monotonic() > _end:
        pytest.skip("the time is over; --minutes gives more")


@pytest.fixture(autouse=True)
def _release(device):
    """Leaves no memory of one case to the next, whose rivals may need all of it."""
    yield
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


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
    """skip_slow(True) skips a case that takes long, unless --long is given."""

    def skip(slow: bool) -> None:
        if slow and not pytestconfig.getoption("--long"):
            pytest.skip("takes long; --long runs it")

    return skip


@pytest.fixture
def race(benchmark, pytestconfig, device):
    """race.run on this test's `benchmark`."""
    return partial(races.run, benchmark, device=device, alone=pytestconfig.getoption("--alone"))
