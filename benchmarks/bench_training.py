"""How long does a step of replaced-token-detection pre-training take, and how much memory?

Ours against transformers' modules in a plain loop, once as they are and once with the generator's
head on the masked tokens alone, and against our own code on the reference backend. The
discriminator has 12 layers of 256, ELECTRA-small's size, with ELECTRA's or DeBERTaV3's attention;
see pretrainers.py.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch

from fastdeberta.timing import interleaved

from . import pretrainers
from .cases import Shape, dtypes, pace
from .memory import in_process
from .pretrainers import FAMILIES, Ours
from .race import OURS, record, waiting

SHAPES = [Shape(16, 128, "small", 4), Shape(4, 512, "small", 4)]
REFERENCE = "our reference"


def cases(device: str) -> list[tuple[str, Shape, str]]:
    return list(product(FAMILIES, SHAPES, dtypes(device)))


def memory_cases(device: str) -> list[tuple[str, Shape]]:
    return list(product(FAMILIES, SHAPES)) if device == "cpu" else []


@pytest.mark.timeout(600)
@pytest.mark.cases("family, shape, dtype", cases)
def test_training(benchmark, device, backend, family: str, shape: Shape, dtype: str) -> None:
    benchmark.group = f"RTD training step, {family}, {dtype}"
    ours = Ours(family, shape, device, dtype, backend)
    steps: dict[str, Callable[[], None]] = {OURS: ours.step}
    batch = ours.batch()
    for name, make in pretrainers.RIVALS.items():
        peer = make(ours)
        if device == "cpu":
            theirs, own = peer.losses(batch), ours.losses(batch)
            torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-4)
        steps[name] = peer.step
    if family != "electra":  # Its attention is torch's in both.
        steps[REFERENCE] = Ours(family, shape, device, dtype, "reference").step
    medians = interleaved(steps, device=device, **pace(device, seconds=6.0, least=3))
    record(benchmark, medians)
    tokens = shape.batch * shape.length
    benchmark.extra_info["tokens_per_second"] = round(1e3 * tokens / medians[OURS])
    benchmark.pedantic(waiting(steps[OURS], device), rounds=3)


@pytest.mark.timeout(600)
@pytest.mark.cases("family, shape", memory_cases)
def test_training_memory(benchmark, device, family: str, shape: Shape) -> None:
    benchmark.group = f"memory of an RTD training step, {family}, fp32"
    measure = partial(in_process, "benchmarks.pretrainers")
    what = (family, str(shape.batch), str(shape.length))
    found = {name: measure(name, *what) for name in pretrainers.RIVALS}
    found[OURS] = benchmark.pedantic(measure, args=(OURS, *what), rounds=1)
    record(benchmark, found, "MiB")
