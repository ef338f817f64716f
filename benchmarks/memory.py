"""Peak memory of one call, beyond its inputs; on a CPU in a process of its own.

python -m benchmarks.memory RIVAL BATCH LENGTH HEADS PASS DTYPE [BACKEND]
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import rivals
from .cases import DTYPES, Shape


def measure(
    rival: str, shape: Shape, part: str, dtype: str, device: str = "cpu", backend: str = "auto"
) -> float:
    """MiB that one pass of a rival (a function of rivals.py) takes; on a CPU Linux only.

    device: "cpu" or "cuda". backend: of ours.
    """
    if device != "cpu":
        return _on_gpu(partial(_prepared, rival, shape, part, dtype, device, backend))
    sizes = map(str, (shape.batch, shape.length, shape.heads))
    return in_process("benchmarks.memory", rival, *sizes, part, dtype, backend)


def in_process(module: str, *arguments: str) -> float:
    """The number that a module prints when a process of its own runs it."""
    # Memory that malloc kept would be taken again unseen.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:]
        raise RuntimeError("\n".join([*last, "", result.stderr]))
    return float(result.stdout)


def _prepared(
    rival: str, shape: Shape, part: str, dtype: str, device: str, backend: str, length: int = 0
) -> Callable[[], object]:
    """A pass at the shape, or at another length."""
    make = getattr(rivals, rival)
    if rival == "ours":
        make = partial(make, backend=backend)
    shape = replace(shape, length=length or shape.length)
    x = rivals.Inputs.random(shape, DTYPES[dtype], training=part != "forward", device=device)
    return rivals.step(make, x, part)


def _on_gpu(prepare: Callable[..., Callable[[], object]]) -> float:
    prepare(length=64)()  # What a first call loads and keeps is not a call's memory.
    step = prepare()
    gc.collect()
    before = torch.cuda.memory_allocated()
    step()  # Trying out tile sizes takes memory once; what is kept from here on counts.
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main(
    rival: str, batch: str, length: str, heads: str, part: str, dtype: str, backend: str = "auto"
) -> None:
    shape = Shape(int(batch), int(length), heads=int(heads))
    prepare = partial(_prepared, rival, shape, part, dtype, "cpu", backend)
    prepare(length=64)()  # What a first call loads and keeps is not a call's memory.
    print(peak(prepare()))


def peak(step: Callable[[], object]) -> float:
    """MiB of this process, at most, during a call, beyond what it held before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back to what is held now.
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
