"""How long does the attention of one layer take, beside its rivals and the machine's limit?

Projections are left out on every side: rivals start from projected queries, keys, values and
position tables. Ours is what "auto" takes, unless --backend names another.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch

import fastdeberta
from fastdeberta.timing import interleaved

from . import limit, memory, rivals
from .cases import DTYPES, GPU_SHAPES, LONG_SHAPES, RULE, SHAPES, Shape, dtypes, pace
from .race import OURS, Out, Rival, record, waiting
from .rivals import Inputs

# On a GPU some kernels take TF32 for float32.
TOLERANCE = {
    "cpu": {"fp32": 1e-4, "bf16": 5e-2},
    "cuda": {"fp32": 5e-3, "bf16": 5e-2, "fp16": 2e-2},
}

Attention = Callable[[Inputs], Callable[[], torch.Tensor]]
COMMON: dict[str, Attention] = {
    "our reference": partial(rivals.ours, backend="reference"),
    "transformers eager": rivals.eager,
    "torch SDPA, content only": rivals.sdpa,
    "torch FlexAttention": rivals.flex,
}
RIVALS: dict[str, dict[str, Attention]] = {
    "cpu": {**COMMON, "disentangled-flash (torch)": rivals.disentangled_flash},
    "cuda": {
        **COMMON,
        "disentangled-flash": rivals.disentangled_flash,
        "flashdeberta": rivals.flash_deberta,
    },
}

PARTS = ["forward", "forward+backward", "backward"]

# Lengths from which eager's calls take many seconds on a CPU.
SLOW_FROM = {"forward": 8192, "forward+backward": 4096, "backward": 2048}

# Compiling FlexAttention takes longer than all the rest of a case.
GPU_FLEX_SHAPES = [Shape(4, 512), Shape(2, 2048)]


def cases(device: str) -> list[tuple[Shape, str, str]]:
    if device == "cpu":
        return list(product(SHAPES + LONG_SHAPES, PARTS, dtypes(device)))
    half = product(["bf16", "fp16"], GPU_SHAPES, PARTS)
    full = product(["fp32"], [Shape(8, 128)], PARTS)
    return [(shape, part, dtype) for dtype, shape, part in (*half, *full)]


def slow(device: str, shape: Shape, part: str) -> bool:
    """Takes minutes; on a GPU, repeats what forward and forward+backward already show."""
    return shape.length >= SLOW_FROM[part] if device == "cpu" else part == "backward"


@pytest.mark.timeout(600)
@pytest.mark.cases("shape, part, dtype", cases)
def test_attention(
    race, benchmark, skip_slow, pytestconfig, device, backend, shape: Shape, part: str, dtype: str
) -> None:
    skip_slow(slow(device, shape, part))
    benchmark.group = f"attention, {part}, {dtype}"
    x = Inputs.random(shape, DTYPES[dtype], training=part != "forward", device=device)
    taken = _backend(x, backend)
    contestants = {OURS: partial(rivals.ours, backend=backend), **RIVALS[device]}
    if device == "cuda" and backend == "auto" and taken != "triton":
        contestants["our triton"] = partial(rivals.ours, backend="triton")
    all_compiled = device == "cpu" or pytestconfig.getoption("--long")

    def maker(name: str) -> Rival:
        if "Flex" in name and not (all_compiled or (dtype == "bf16" and shape in GPU_FLEX_SHAPES)):
            raise Out("compiles for long; --long times it at every shape")
        call = rivals.step(contestants[name], x, part)
        return Rival(call, same="content only" not in name)

    peak, how = limit.gemm_peak(DTYPES[dtype], device)
    long = shape in LONG_SHAPES
    medians = race(
        {name: partial(maker, name) for name in contestants},
        tolerance=TOLERANCE[device][dtype],
        **pace(device, seconds=1.0, least=2 if long else 3, turn=0.3 if long else 0.05),
    )
    info = benchmark.extra_info
    info["backend"] = taken
    info["peak_gflops"], info["peak"] = peak and round(peak / 1e9, 1), how
    if peak:
        least = 1e3 * limit.needed_flops(shape, part) / peak
        info["limit_ms"] = round(least, 4)
        info["share_of_limit"] = round(least / medians[OURS], 3)


@pytest.mark.cases("dtype", dtypes)
def test_padding(benchmark, race, device, backend, dtype: str) -> None:
    """What does a mask save, where half of the tokens are padding?"""
    benchmark.group = "attention, padded batch, forward"
    shape = Shape(8, 512)
    x = Inputs.random(shape, DTYPES[dtype], device=device)
    lengths = torch.linspace(0.25, 0.75, shape.batch).mul(shape.length).long()
    mask = (torch.arange(shape.length) < lengths[:, None]).to(device)
    ours = partial(rivals.ours, x, backend)
    race(
        {
            OURS: lambda: Rival(ours(key_mask=mask)),
            "ours, dense": lambda: Rival(ours(), same=False),
        },
        tolerance=TOLERANCE[device][dtype],
        **pace(device, seconds=1.0, turn=0.05),
    )
    benchmark.extra_info["share_of_tokens"] = round(float(mask.float().mean()), 3)


@pytest.mark.cases("dtype", dtypes)
def test_growth(benchmark, device, backend, dtype: str) -> None:
    """Does a score cost the same in a long sequence as in a short one?"""
    benchmark.group = "attention, time of one score, forward"
    shapes = {s.id: s for s in (Shape(1, 2048), Shape(1, 16384), Shape(1, 65536, heads=1))}
    inputs = {name: Inputs.random(s, DTYPES[dtype], device=device) for name, s in shapes.items()}
    if _backend(inputs["1x65536"], backend) == "reference":
        pytest.skip("the reference backend holds all scores: 16 GiB a head at 65,536 tokens")

    calls = {name: rivals.ours(x, backend) for name, x in inputs.items()}
    medians = interleaved(calls, device=device, **pace(device, seconds=1.0, least=2, turn=0.1))
    scores = {name: s.heads * s.length**2 for name, s in shapes.items()}
    times = {name: 1e6 * medians[name] / scores[name] for name in shapes}
    record(benchmark, times, "ns a score", ours="1x2048")
    benchmark.extra_info["mebibytes"] = {
        name: round(memory.measure("ours", s, "forward", dtype, device, backend))
        for name, s in shapes.items()
    }
    benchmark.pedantic(waiting(calls["1x2048"], device), rounds=3)


def _backend(x: Inputs, named: str) -> str:
    """The backend that ours takes."""
    if named != "auto":
        return named
    return fastdeberta.explain(*x, x.table, relative_position=RULE).backend
