"""How long does a step of replaced-token-detection pre-training take, with our attention's kernels
and with its reference?

A step is all that the trainer does with a batch: both networks, sampling, loss, backward, clipping
and AdamW, dropout as in pre-training. The discriminator is of ELECTRA-small's size with
DeBERTaV3's attention; the generator has its width and a quarter of its layers.
"""

from contextlib import nullcontext
from itertools import product

import pytest
import torch

from fastdeberta.attention import set_backend
from fastdeberta.pretraining.batches import Corruption
from fastdeberta.pretraining.examples import Rows
from fastdeberta.pretraining.objectives import OBJECTIVES
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.timing import interleaved
from fastdeberta.training.distributed import to_device
from fastdeberta.training.draws import Draws
from fastdeberta.training.optimizer import clip_gradients, make_optimizer, parameter_groups

from .cases import Shape, dtypes, pace
from .race import OURS, record, waiting

SHAPES = [Shape(16, 128, "small", 4), Shape(4, 512, "small", 4)]
VOCABULARY, MASK, SPECIAL = 8192, 3, [0, 1, 2, 3]


class Training:
    """A pair, its optimiser and one batch of random tokens."""

    def __init__(self, shape: Shape, dtype: str, device: str):
        hidden = shape.heads * shape.head_dim
        self.settings = PretrainSettings(
            discriminator={
                "hidden_size": hidden,
                "num_hidden_layers": 12,
                "num_attention_heads": shape.heads,
                "intermediate_size": 4 * hidden,
            },
            generator={"num_hidden_layers": 3},
        )
        generator, config = self.settings.configs(VOCABULARY, pad_token_id=0)
        self.objective = OBJECTIVES["electra"](config, generator=generator, tie="gdes")
        self.objective.to(device).train()
        groups = parameter_groups(self.objective.parameters(), 1e-4, self.settings.weight_decay)
        self.optimizer = make_optimizer(groups, self.settings)
        ids = torch.randint(len(SPECIAL), VOCABULARY, (shape.batch, shape.length))
        special = torch.zeros(VOCABULARY, dtype=torch.bool)
        special[SPECIAL] = True
        draws = Draws(0, 0, 0, shape.batch, shape.batch)
        batch = Corruption(MASK, special)(Rows(ids), draws)
        self.counts = self.objective.counts(batch)
        self.batch = to_device(batch, torch.device(device))
        self.bf16, self.device = dtype == "bf16", device

    def step(self, backend: str) -> None:
        set_backend(self.objective, backend)
        autocast = torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()
        with autocast:
            sums = self.objective(self.batch)
        mlm, rtd = (sums[name] / self.counts[name] for name in ("mlm_loss", "rtd_loss"))
        (mlm + self.settings.rtd_weight * rtd).backward()
        clip_gradients(self.optimizer, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def cases(device: str) -> list[tuple[Shape, str]]:
    return list(product(SHAPES, dtypes(device)))


@pytest.mark.timeout(600)
@pytest.mark.cases("shape, dtype", cases)
def test_training(benchmark, device, backend, shape: Shape, dtype: str) -> None:
    benchmark.group = f"RTD training step, {dtype}"
    training = Training(shape, dtype, device)
    steps = {
        OURS: lambda: training.step(backend),
        "our reference": lambda: training.step("reference"),
    }
    medians = interleaved(steps, device=device, **pace(device, seconds=4.0, least=3))
    record(benchmark, medians)
    tokens = shape.batch * shape.length
    benchmark.extra_info["tokens_per_second"] = round(1e3 * tokens / medians[OURS])
    benchmark.pedantic(waiting(steps[OURS], device), rounds=3)
