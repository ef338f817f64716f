"""A tiny masked language model, trained by one process or, under torchrun, by several."""

import os
import signal
import sys
from typing import NamedTuple

import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdeberta.models import Model
from fastdeberta.training import Trainer, TrainSettings
from fastdeberta.training.optimizer import parameter_groups
from fastdeberta.training.settings import apply_overrides, build

MASK, PAD = 4, 0
THAW, COPY, FREEZE = 10, 20, 35  # steps
RUN = {
    "device": "cpu",
    "steps": 50,
    "batch_size": 13,  # which neither ranks nor micro-batches divide
    "warmup_steps": 5,
    "log_every": 1,
    "evaluate_every": 25,
    "checkpoint_every": 15,
    "learning_rate": 2e-3,
}


class Batch(NamedTuple):
    """Padded rows, where they are real, and the tokens to predict (-100: none)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Objective(nn.Module):
    """The sums of cross-entropy at the masked tokens, and of hits there; beside them one of logits
    with a parameter of its own, which is only logged."""

    def __init__(self, network: Model):
        super().__init__()
        self.network = network
        self.probe = nn.Parameter(torch.ones(1, 1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.network(batch.input_ids, batch.attention_mask).logits.flatten(0, 1)
        labels = batch.labels.flatten()
        hits = (logits.argmax(-1) == labels).sum()
        probed = (self.probe * logits[labels >= 0]).logsumexp(-1).sum()
        mlm = F.cross_entropy(logits, labels, reduction="sum")
        return {"mlm": mlm, "hits": hits, "probed": probed}


class Masked:
    """Rows of 4 to 20 tokens. At one step a layer becomes a copy of another; a part of the head is
    frozen before an earlier one, another from a later one on."""

    title = "masked"
    rows = 60

    def __init__(self, death: str = ""):
        torch.manual_seed(3)
        network = Model(tiny.config(num_hidden_layers=2, vocab_size=29), "mlm")
        self.model: nn.Module = Objective(network)
        self.network, self.death, self.step = network, death, 0
        self.texts = [tiny.token_ids(4 + i % 17, vocab=29).roll(i) for i in range(self.rows)]

    def parameter_groups(self):
        head = [*self.network.head.parameters(), self.model.probe]
        return [
            *parameter_groups(self.network.backbone.parameters(), 2e-3, 0.01, "backbone"),
            *parameter_groups(head, 1e-3, 0.01, "head"),
        ]

    def begin(self, step):
        self.step = step
        layers = self.network.backbone.encoder.layer
        if step == COPY:
            layers[1].load_state_dict(layers[0].state_dict())
        self.network.head.dense.weight.requires_grad_(step < FREEZE)
        self.network.head.LayerNorm.requires_grad_(step >= THAW)

    def batch(self, rows, draws):
        if self.death == f"{os.environ.get('RANK')}@{self.step}":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.collate([self.texts[i] for i in rows.tolist()], draws.uniform(20))

    def collate(self, texts, numbers):
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=PAD)
        real = ids != PAD
        chosen = (numbers[:, : ids.size(1)] < 0.3) & real
        chosen[:, 0] = True
        labels = ids.masked_fill(~chosen, -100)
        return Batch(ids.masked_fill(chosen, MASK), real, labels)

    def counts(self, batch):
        chosen = float((batch.labels >= 0).sum())
        return {"mlm": chosen, "hits": chosen, "probed": chosen}

    def weights(self, step):
        return {"mlm": 1.5}

    def tokens(self, batch):
        return int(batch.attention_mask.sum())

    def compute(self, batch):
        return 1e6 * batch.input_ids.size(0)

    def evaluate(self):
        assert os.environ.get("RANK", "0") == "0"
        assert self.model.probe.item() == 1.0
        batch = self.collate(self.texts, torch.rand(self.rows, 20))
        return {"mlm": float(self.model(batch)["mlm"]) / self.counts(batch)["mlm"]}

    def export(self, directory):
        self.network.save_pretrained(directory / "model")


def trainer(output: str, death: str = "", **changes) -> Trainer:
    settings = build(TrainSettings, {**RUN, "output": output, **changes})
    return Trainer(Masked(death), settings)


def run(output: str, death: str = "", **changes) -> dict:
    return trainer(output, death, **changes).run()


if __name__ == "__main__":
    # Each argument is a run: OUTPUT:RANK@STEP:KEY=VALUE,... where rank and step are a death's.
    for argument in sys.argv[1:]:
        output, death, pairs = argument.split(":")
        run(output, death, **apply_overrides({}, filter(None, pairs.split(","))))
