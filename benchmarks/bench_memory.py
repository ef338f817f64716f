"""How much memory does attention take beyond its inputs?

The figures are MiB, each from a process of its own; the times that pytest-benchmark shows are those
of such a process and mean nothing.
"""

import pytest

from .cases import DTYPES, Shape
from .memory import measure
from .race import OURS, record

RIVALS = {"torch SDPA, content only": "sdpa", "transformers eager": "eager"}
SHAPES = [Shape(1, 1024), Shape(1, 2048), Shape(1, 4096)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_memory(benchmark, skip_slow, shape: Shape, part: str, dtype: str) -> None:
    skip_slow(dtype == "bf16")
    benchmark.group = f"memory of attention beyond its inputs, {part}, {dtype}"
    found = {OURS: benchmark.pedantic(measure, args=("ours", shape, part, dtype), rounds=1)}
    found |= {name: measure(rival, shape, part, dtype) for name, rival in RIVALS.items()}
    record(benchmark, found, "MiB")
