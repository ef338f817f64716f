"""How long does a whole encoder take: 12 layers in v3-base's shape, without gradients?

All run in this process, on a CPU on the same number of threads. Engines other than torch keep
threads of their own that spin for some time after a call and would slow the next rival on few
cores. So each rival's turn has several calls, starts with a rest in which the threads of the last
one fall asleep, and does not count its first call. `--alone` shows what the company costs.
"""

from functools import partial
from itertools import product

import pytest

from . import encoders
from .cases import DTYPES, LONG_SHAPES, SHAPES, Shape, dtypes, pace
from .encoders import Batch
from .race import OURS, Rival

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}

RIVALS = {
    "cpu": {
        "transformers eager": encoders.eager,
        "disentangled-flash (torch)": encoders.disentangled_flash,
        "onnxruntime": encoders.onnxruntime,
        "openvino": encoders.openvino,
        "BERT, torch SDPA": encoders.sdpa_bert,
        "BERT, onnxruntime": partial(encoders.onnxruntime, model=encoders.bert),
        "BERT, openvino": partial(encoders.openvino, model=encoders.bert),
    },
    "cuda": {
        "transformers eager": encoders.eager,
        "disentangled-flash": encoders.disentangled_flash,
        "flashdeberta": encoders.flash_deberta,
        "BERT, torch SDPA": encoders.sdpa_bert,
    },
}


def cases(device: str) -> list[tuple[Shape, str]]:
    gpu = [Shape(1, 128), Shape(8, 128), Shape(4, 512)]
    shapes = SHAPES + LONG_SHAPES if device == "cpu" else gpu
    return list(product(shapes, dtypes(device)))


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.timeout(1200)
@pytest.mark.cases("shape, dtype", cases)
def test_encoder(
    race, benchmark, skip_slow, directory, device, backend, shape: Shape, dtype: str
) -> None:
    skip_slow(shape in LONG_SHAPES)
    benchmark.group = f"encoder, inference, {dtype}"
    batch = Batch.random(shape, DTYPES[dtype], directory, device)
    contestants = {
        OURS: partial(encoders.ours, backend=backend),
        "transformers, accelerated": partial(encoders.accelerated, backend=backend),
        **RIVALS[device],
    }
    race(
        {
            name: lambda name=name: Rival(contestants[name](batch), same="BERT" not in name)
            for name in contestants
        },
        tolerance=TOLERANCE[dtype],
        **pace(device, seconds=4.0, least=3, turn=0.2, rest=0.05),
    )
