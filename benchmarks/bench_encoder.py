"""How long does a whole encoder take: 12 layers in v3-base's shape, without gradients?

All run in this process on the same number of threads. Engines other than torch keep threads of
their own that spin for some time after a call and would slow the next rival on few cores. So each
rival's turn has several calls, starts with a rest in which the threads of the last one fall
asleep, and does not count its first call. `--alone` shows what the company costs.
"""

from functools import partial

import pytest

from . import rivals
from .cases import DTYPES, LONG_SHAPES, SHAPES, Shape
from .race import OURS, Rival
from .rivals import Batch

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}

RIVALS = {
    OURS: rivals.our_encoder,
    "transformers, accelerated": rivals.accelerated_encoder,
    "transformers eager": rivals.eager_encoder,
    "disentangled-flash (torch)": rivals.disentangled_flash_encoder,
    "onnxruntime": rivals.onnxruntime_encoder,
    "openvino": rivals.openvino_encoder,
    "BERT, torch SDPA": rivals.bert_encoder,
    "BERT, onnxruntime": partial(rivals.onnxruntime_encoder, model=rivals.bert),
    "BERT, openvino": partial(rivals.openvino_encoder, model=rivals.bert),
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + LONG_SHAPES, ids=lambda s: s.id)
def test_encoder(race, benchmark, skip_slow, directory, shape: Shape, dtype: str) -> None:
    skip_slow(shape in LONG_SHAPES)
    benchmark.group = f"encoder, inference, {dtype}"
    batch = Batch.random(shape, DTYPES[dtype], directory)
    race(
        {
            name: lambda name=name: Rival(RIVALS[name](batch), same="BERT" not in name)
            for name in RIVALS
        },
        tolerance=TOLERANCE[dtype],
        seconds=4.0,
        least=3,
        turn=0.2,
        rest=0.05,
    )
