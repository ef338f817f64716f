"""Compiled encoders: the losses of eager ones, and graphs that serve all later steps."""

import pytest
import tiny
from torch._dynamo import reset
from torch._dynamo.utils import counters

from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.task import Pretraining, load_corpus
from fastdeberta.training import Trainer
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import build

ELECTRA = {"model_type": "electra", "embedding_size": 16}
STEPS, SEEN = 12, 5


def run(output, text, **changes):
    """Losses by step; how many graphs there are after each step; graph breaks."""
    network = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    network |= {
        "intermediate_size": 48,
        "hidden_dropout_prob": 0.0,
    }  # Compiled, it draws otherwise.
    network |= {"attention_probs_dropout_prob": 0.0, **changes.get("discriminator", {})}
    values = {
        "output": str(output), "data": str(text), "device": "cpu", "vocab_size": 120,
        "sequence_length": 24, "held_out": 0.1, "steps": STEPS, "warmup_steps": 2, "batch_size": 6,
        "log_every": 1, "evaluate_every": 4,
    }  # fmt: skip
    settings = build(PretrainSettings, {**values, **changes, "discriminator": network})
    reset()
    counters.clear()
    task, graphs, chosen = Pretraining(settings, load_corpus(settings)), [], set()
    step = Trainer._train_step

    def counted(trainer, shares):
        step(trainer, shares)
        graphs.append(counters["stats"]["unique_graphs"])

    forward = task.objective.forward
    task.objective.forward = lambda batch: [chosen.add(len(batch.positions)), forward(batch)][1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", counted)
        Trainer(task, settings).run()
    losses = [x["loss"] for x in read_metrics(output / "metrics.jsonl") if "loss" in x]
    return losses, graphs, sum(counters["graph_break"].values()), chosen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "networks"),
    [
        ({"objective": "mlm"}, 1),
        ({"discriminator": ELECTRA, "tie": "embeddings"}, 2),
        ({"tie": "gdes", "layout": "packed"}, 2),
    ],
    ids=["mlm", "electra", "gdes-packed"],
)
def test_compiled_encoders(changes, networks, tmp_path):
    """The data-dependent sizes of packed batches become dynamic with their second value."""
    (tmp_path / "text.txt").write_text("\n\n".join(tiny.documents()))
    text = tmp_path / "text.txt"
    eager, none, _, _ = run(tmp_path / "eager", text, **changes)
    losses, graphs, breaks, chosen = run(tmp_path / "compiled", text, compile=True, **changes)
    assert losses == pytest.approx(eager, rel=1e-4) and losses[0] == pytest.approx(eager[0], 1e-6)
    assert len(losses) == STEPS and set(none) == {0}
    packed = changes.get("layout") == "packed"
    assert (len(chosen) > 3) == packed
    assert graphs[0] == networks and graphs[-1] == networks * (1 + packed)
    assert graphs[SEEN] == graphs[-1] and breaks == 0
