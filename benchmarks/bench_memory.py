"""How much memory does attention take beyond its inputs?

The figures are MiB, on a CPU each from a process of its own; the times that pytest-benchmark shows
are those of the measurement and mean nothing.
"""

from functools import partial
from itertools import product

import pytest

from .cases import Shape
from .memory import measure
from .race import OURS, Rival, gather, record

RIVALS = {"torch SDPA, content only": "sdpa", "transformers eager": "eager"}
GPU_RIVALS = {
    **RIVALS,
    "disentangled-flash": "disentangled_flash",
    "flashdeberta": "flash_deberta",
}


def cases(device: str) -> list[tuple[Shape, str, str]]:
    lengths, dtypes = ([1024, 2048, 4096], ["fp32", "bf16"])
    if device == "cuda":
        lengths, dtypes = ([2048, 8192], ["bf16"])
    shapes = [Shape(1, length) for length in lengths]
    return list(product(shapes, ["forward", "forward+backward"], dtypes))


@pytest.mark.timeout(600)
@pytest.mark.cases("shape, part, dtype", cases)
def test_memory(benchmark, skip_slow, device, backend, shape: Shape, part: str, dtype: str) -> None:
    skip_slow(device == "cpu" and dtype == "bf16")
    benchmark.group = f"memory of attention beyond its inputs, {part}, {dtype}"
    what = (shape, part, dtype, device, backend)
    rivals = RIVALS if device == "cpu" else GPU_RIVALS
    makers = {
        name: partial(Rival, partial(measure, rival, *what)) for name, rival in rivals.items()
    }
    ours = partial(benchmark.pedantic, measure, args=("ours", *what), rounds=1)
    _, found, left_out = gather({OURS: partial(Rival, ours), **makers}, device)
    record(benchmark, found, "MiB", left_out=left_out)
