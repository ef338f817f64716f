"""Peak memory of one call, beyond its inputs, in a process of its own.

python -m benchmarks.memory RIVAL BATCH LENGTH HEADS PASS DTYPE
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import rivals
from .cases import DTYPES, Shape


def measure(rival: str, shape: Shape, part: str, dtype: str) -> float:
    """MiB that one pass of a rival (a function of rivals.py) takes; Linux only."""
    # Memory that malloc kept would be taken again unseen.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    sizes = (shape.batch, shape.length, shape.heads)
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", rival, *map(str, sizes), part, dtype],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def main(rival: str, batch: str, length: str, heads: str, part: str, dtype: str) -> None:
    make = getattr(rivals, rival)

    def prepared(length: int):
        shape = Shape(int(batch), length, heads=int(heads))
        x = rivals.Inputs.random(shape, DTYPES[dtype], training=part != "forward")
        return rivals.step(make, x, part)

    prepared(64)()  # What a first call loads and keeps is not a call's memory.
    step = prepared(int(length))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back to what is held now.
    before = _status("VmRSS")
    step()
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """KiB."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
