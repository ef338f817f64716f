"""How long does the attention of one layer take, beside its rivals and the machine's limit?

Projections are left out on every side: rivals start from projected queries, keys, values and
position tables. Ours is what "auto" takes.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

import fastdeberta
from fastdeberta.timing import interleaved

from . import limit, memory, rivals
from .cases import DTYPES, LONG_SHAPES, RULE, SHAPES, Shape
from .race import OURS, Rival, record
from .rivals import Inputs

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}

RIVALS: dict[str, Callable[[Inputs], Callable[[], torch.Tensor]]] = {
    OURS: rivals.ours,
    "our reference": partial(rivals.ours, backend="reference"),
    "transformers eager": rivals.eager,
    "torch SDPA, content only": rivals.sdpa,
    "torch FlexAttention": rivals.flex,
    "disentangled-flash (torch)": rivals.disentangled_flash,
}

# Lengths from which eager's calls take many seconds.
SLOW_FROM = {"forward": 8192, "forward+backward": 4096, "backward": 2048}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["forward", "forward+backward", "backward"])
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=lambda s: s.id)
def test_attention(race, benchmark, skip_slow, shape: Shape, part: str, dtype: str) -> None:
    skip_slow(shape.length >= SLOW_FROM[part])
    benchmark.group = f"attention, {part}, {dtype}"
    x = Inputs.random(shape, DTYPES[dtype], training=part != "forward")

    def maker(name: str) -> Rival:
        return Rival(rivals.step(RIVALS[name], x, part), same="content only" not in name)

    peak, how = limit.gemm_peak(DTYPES[dtype])
    medians = race(
        {name: partial(maker, name) for name in RIVALS},
        tolerance=TOLERANCE[dtype],
        seconds=1.0,
        least=2 if shape in LONG_SHAPES else 3,
        turn=0.3 if shape in LONG_SHAPES else 0.05,
    )
    info = benchmark.extra_info
    info["backend"] = fastdeberta.explain(*x, x.table, relative_position=RULE).backend
    info["peak_gflops"], info["peak"] = peak and round(peak / 1e9, 1), how
    if peak:
        least = 1e3 * limit.needed_flops(shape, part) / peak
        info["limit_ms"] = round(least, 4)
        info["share_of_limit"] = round(least / medians[OURS], 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding(benchmark, race, dtype: str) -> None:
    """What does a mask save, where half of the tokens are padding?"""
    benchmark.group = "attention, padded batch, forward"
    shape = Shape(8, 512)
    x = Inputs.random(shape, DTYPES[dtype])
    lengths = torch.linspace(0.25, 0.75, shape.batch).mul(shape.length).long()
    mask = torch.arange(shape.length) < lengths[:, None]
    race(
        {
            OURS: lambda: Rival(rivals.ours(x, key_mask=mask)),
            "ours, dense": lambda: Rival(rivals.ours(x), same=False),
        },
        tolerance=TOLERANCE[dtype],
        seconds=1.0,
        turn=0.05,
    )
    benchmark.extra_info["share_of_tokens"] = round(float(mask.float().mean()), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growth(benchmark, dtype: str) -> None:
    """Does a score cost the same in a long sequence as in a short one?"""
    benchmark.group = "attention, time of one score, forward"
    shapes = {s.id: s for s in (Shape(1, 2048), Shape(1, 16384), Shape(1, 65536, heads=1))}
    inputs = {name: Inputs.random(s, DTYPES[dtype]) for name, s in shapes.items()}
    longest = inputs["1x65536"]
    if fastdeberta.explain(*longest, longest.table, relative_position=RULE).backend == (
        "reference"
    ):
        pytest.skip("the reference backend holds all scores: 16 GiB a head at 65,536 tokens")

    calls = {name: rivals.ours(x) for name, x in inputs.items()}
    medians = interleaved(calls, seconds=1.0, least=2, turn=0.1)
    scores = {name: s.heads * s.length**2 for name, s in shapes.items()}
    times = {name: 1e6 * medians[name] / scores[name] for name in shapes}
    record(benchmark, times, "ns a score", ours="1x2048")
    benchmark.extra_info["mebibytes"] = {
        name: round(memory.measure("ours", s, "forward", dtype)) for name, s in shapes.items()
    }
    benchmark.pedantic(calls["1x2048"], rounds=3)
