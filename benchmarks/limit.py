"""The time below which a machine cannot do attention's arithmetic: needed work over peak."""

import time
from functools import cache, partial

import torch

from fastdeberta import libraries
from fastdeberta.timing import interleaved

from .cases import RULE, Shape


def needed_flops(shape: Shape, part: str) -> float:
    """Floating-point operations that forward, backward or both cannot do without.

    Content takes two products forward (QKᵀ, PV) and five backward. Each position term takes one
    forward and three backward, of each token with those rows of the table that it meets.
    """
    n, d = shape.length, shape.head_dim
    content = 4 * n * n * d
    position = 4 * d * _rows_met(n)
    sums = {"forward": content + position, "backward": 2.5 * content + 3 * position}
    sums["forward+backward"] = sums["forward"] + sums["backward"]
    return shape.batch * shape.heads * float(sums[part])


def _rows_met(length: int) -> int:
    """The number of different rows that a query meets, summed over the queries."""
    rows = RULE.row(torch.arange(1 - length, length))
    # Rows never decrease with distance, so different rows are steps in a window of `length`.
    steps = torch.cat([torch.zeros(1, dtype=torch.long), (rows.diff() != 0).cumsum(0)])
    return int((1 + steps[length - 1 :] - steps[:length]).sum())


def gemm_peak(
    dtype: torch.dtype, device: str = "cpu", seconds: float = 0.1
) -> tuple[float | None, str]:
    """FLOP/s that a matrix product reaches, and how that is known.

    On a CPU it is ours on all threads, operands in the nearest cache; on a GPU torch's of two
    large matrices.
    """
    if device != "cpu":
        return _torch_peak(dtype, seconds)
    if reason := libraries.load("_C"):
        return None, reason
    measure = getattr(torch.ops.fastdeberta_C, "gemm_peak", None)
    if measure is None:
        return None, "this build of fastdeberta._C has no gemm_peak"
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = max(best, measure(dtype == torch.bfloat16))
    if not best:
        return None, f"this machine has no instruction for products in {dtype}"
    return best * torch.get_num_threads(), "one thread's best, times the threads"


@cache
def _torch_peak(dtype: torch.dtype, seconds: float, size: int = 4096) -> tuple[float, str]:
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    product = {"product": partial(torch.matmul, a, b)}
    taken = interleaved(product, seconds, device="cuda", turn=seconds / 5)["product"]
    precision = torch.get_float32_matmul_precision() if dtype == torch.float32 else ""
    how = f"torch.matmul of two {size}x{size} matrices of {dtype}"
    return 2e3 * size**3 / taken, f"{how}, precision {precision}" if precision else how
