"""SiFT: against a calculation by hand in float64, its three passes, what it leaves untouched.

Run as a program it is a fine-tuning run, by one process or, under torchrun, by several.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
from closeness import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdeberta.finetuning.sift import SiFT
from fastdeberta.models import Model
from fastdeberta.models.encoded import Encoded, ModelOutput, Targets
from fastdeberta.packing import pack
from fastdeberta.training import Trainer, TrainSettings
from fastdeberta.training.optimizer import parameter_groups
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import apply_overrides, build

TESTS = Path(__file__).parent
LENGTHS = (9, 14, 5, 11)
LABELS = 3
MODELS = {
    "v3": ("deberta-v2", {}),
    "v3-projected": ("deberta-v2", {"embedding_size": 20}),
    "v1": ("deberta", {"position_biased_input": True, "type_vocab_size": 2}),
    "electra-projected": ("electra", {"summary_last_dropout": 0.0}),
}
HEADS = {
    "classification": "sequence",
    "regression": "sequence",
    "choice": "choice",
    "tagging": "token",
    "span": "span",
}
ALPHA, SIGMA, STEP = 5.0, 1e-2, 1e-4


class Batch(NamedTuple):
    """Packed rows if there is a cu_seqlens, else padded ones with a mask."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


class Objective(nn.Module):
    """Any head's sums of losses. Labels: [B]; of spans [B, 2]; of taggers like input_ids."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def outputs(self, batch: Batch) -> tuple[Tensor, ...]:
        choices = 2 if self.model.head_name == "choice" else None
        ids, mask = batch.input_ids, batch.attention_mask
        if choices and batch.cu_seqlens is None:
            ids, mask = (x.unflatten(0, (-1, choices)) for x in (ids, mask))
        out = self.model(
            ids,
            mask,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            num_choices=choices,
        )
        if self.model.head_name == "span":
            return out.start_logits, out.end_logits
        if self.model.head_name == "token":
            return (out.logits[batch.labels >= 0],)
        return (out.logits,)

    def losses(self, batch: Batch, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if self.model.head_name == "token":
            labels = [batch.labels[batch.labels >= 0]]
        else:
            labels = list(batch.labels.t()) if batch.labels.dim() == 2 else [batch.labels]
        pairs = list(zip(outputs, labels, strict=True))
        return {"loss": torch.stack([loss_of(self.model, *pair) for pair in pairs]).mean()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.losses(batch, self.outputs(batch))


def loss_of(model: Model, logits: Tensor, labels: Tensor) -> Tensor:
    if model.head_name == "sequence" and model.config.num_labels == 1:
        return (logits.squeeze(-1) - labels.to(logits.dtype)).square().sum()
    return F.cross_entropy(logits, labels, reduction="sum")


def build_objective(name="v3", task="classification", dtype=torch.float64, **changes) -> Objective:
    family, more = MODELS[name]
    labels = 1 if task == "regression" else LABELS
    config = tiny.config(family, **more, num_labels=labels, **changes)
    return Objective(tiny.randomize(Model(config, HEADS[task])).to(dtype)).train()


def texts() -> list[Tensor]:
    return [tiny.token_ids(sum(LENGTHS))[sum(LENGTHS[:i]) :][:n] for i, n in enumerate(LENGTHS)]


def targets(task: str) -> list[Tensor]:
    """Of each text; of the two questions with two options each."""
    count = len(LENGTHS)
    if task == "classification":
        return list(torch.arange(count) % LABELS)
    if task == "regression":
        return list(torch.linspace(-1, 2, count))
    if task == "choice":
        return list(torch.arange(count // 2))
    if task == "span":
        return [torch.tensor([i, n - 2]) for i, n in enumerate(LENGTHS)]
    return [torch.arange(n) % (LABELS + 1) - 1 for n in LENGTHS]  # -1: not scored


def batch_of(task: str, packed: bool = False) -> Batch:
    labels = targets(task)
    if packed:
        ids, cu_seqlens, longest = pack(texts())
        flat = torch.cat(labels) if task == "tagging" else torch.stack(labels)
        return Batch(ids, flat, None, cu_seqlens, longest)
    ids = nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    join = nn.utils.rnn.pad_sequence if task == "tagging" else torch.stack
    padding = {"batch_first": True, "padding_value": -1} if task == "tagging" else {}
    return Batch(ids, join(labels, **padding), ids != 0)


def total(sums: dict[str, Tensor], rows: int) -> Tensor:
    return (sums["loss"] + ALPHA * sums["sift_loss"]) / rows


def rows_of(task: str) -> int:
    if task == "tagging":
        return sum(int((labels >= 0).sum()) for labels in targets(task))
    return len(targets(task))


# By hand: one text at a time, embeddings and divergences written out.


def entering(model: Model, ids: Tensor) -> Tensor:
    """What enters the embeddings' LayerNorm, with zero mean and unit variance: [L, width]."""
    parts = model.backbone.embeddings
    rows = []
    for position, token in enumerate(ids.tolist()):
        row = parts.word_embeddings.weight[token]
        if parts.position_embeddings is not None:
            row = row + parts.position_embeddings.weight[position]
        if parts.token_type_embeddings is not None:
            row = row + parts.token_type_embeddings.weight[0]
        if parts.embed_proj is not None and not parts.is_electra:
            row = parts.embed_proj.weight @ row
        deviation = row - row.sum() / len(row)
        rows.append(deviation / (deviation.square().sum() / len(row) + 1e-7).sqrt())
    return torch.stack(rows)


def leaving(model: Model, rows: Tensor) -> Tensor:
    """The embeddings, given what enters their LayerNorm."""
    parts = model.backbone.embeddings
    deviation = rows - rows.mean(-1, keepdim=True)
    variance = deviation.square().mean(-1, keepdim=True)
    norm = parts.LayerNorm
    x = deviation / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    if parts.is_electra and parts.embed_proj is not None:
        x = x @ parts.embed_proj.weight.t() + parts.embed_proj.bias
    return x


def logits_of(model: Model, texts: list[Tensor], task: str) -> list[list[Tensor]]:
    """Of each output a vector of logits for each scored row, from what enters the LayerNorm."""
    found: list[list[Tensor]] = [[], []] if task == "span" else [[]]
    for i, rows in enumerate(texts):
        hidden = model.backbone.encoder(leaving(model, rows)[None], None)[-1]
        output = ModelOutput(hidden)
        model.head.fill(
            output,
            Encoded(hidden, model.backbone.embeddings.word_embeddings.weight, choices=1),
            Targets(),
        )
        if task == "span":
            found[0].append(output.start_logits[0])
            found[1].append(output.end_logits[0])
        elif task == "tagging":
            labels = targets(task)[i]
            found[0] += [
                row for row, label in zip(output.logits[0], labels, strict=True) if label >= 0
            ]
        elif task == "choice" and i % 2:
            found[0][-1] = torch.cat([found[0][-1], output.logits[0]])
        else:
            found[0].append(output.logits[0])
    return found


def divergence(logits: Tensor, target: Tensor, task: str) -> Tensor:
    """One row's, of logits from the constant target."""
    if task == "regression":
        return (logits[0] - target[0].detach()) ** 2
    p, q = torch.softmax(target.detach(), 0), torch.softmax(logits, 0)
    return sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(p)))


def by_hand(model: Model, task: str, noise: Tensor, step: float = STEP) -> dict[str, Tensor]:
    """The sums of SiFT(Objective(model)), given the first delta of all tokens in a row."""
    clean_rows = [entering(model, ids) for ids in texts()]
    clean = logits_of(model, clean_rows, task)
    labels = targets(task)
    if task == "tagging":
        labels = [label for text in labels for label in text if label >= 0]
    losses = []
    for output, rows in enumerate(clean):
        for row, label in zip(rows, labels, strict=True):
            label = label[output] if task == "span" else label
            if task == "regression":
                losses.append((row[0] - label) ** 2)
            else:
                losses.append(torch.logsumexp(row, 0) - row[label])
    delta = [x.clone().requires_grad_() for x in noise.split(LENGTHS)]

    def perturbed(delta):
        rows = [x.detach() + d for x, d in zip(clean_rows, delta, strict=True)]
        return logits_of(model, rows, task)

    def pairs(delta):
        for ours, theirs in zip(perturbed(delta), clean, strict=True):
            yield from zip(ours, theirs, strict=True)

    inner = sum(divergence(q, p, task) for q, p in pairs(delta))
    ascended = []
    for d, gradient in zip(delta, torch.autograd.grad(inner, delta), strict=True):
        largest = torch.stack([token.abs().max() for token in gradient])
        ascended.append(d.detach() + step * gradient / (1e-6 + largest[:, None]))
    if task == "regression":
        terms = [(q[0] - p[0]) ** 2 for q, p in pairs(ascended)]
    else:
        terms = [divergence(q, p, task) + divergence(p, q, task) for q, p in pairs(ascended)]
    return {"loss": sum(losses) / len(clean), "sift_loss": sum(terms) / len(clean)}


def first_delta(objective: Objective, seed: int = 5) -> Tensor:
    width = objective.model.backbone.embeddings.LayerNorm.weight.numel()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(sum(LENGTHS), width, generator=generator) * SIGMA
    return noise.clamp(-2 * SIGMA, 2 * SIGMA)


def run_sift(objective: Objective, batch: Batch, task: str, seed: int = 5, **settings):
    """The sums, and the gradients of every parameter."""
    torch.manual_seed(seed)
    sums = SiFT(objective, ALPHA, **settings).train()(batch)
    return sums, gradients(objective, sums, task)


def gradients(objective: Objective, sums: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    named = dict(objective.model.named_parameters())
    loss = total(sums, rows_of(task))
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: x for name, x in zip(named, found, strict=True) if x is not None}


def assert_same(ours, theirs, rtol=1e-9, atol=1e-11):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize(
    ("name", "packed"), [*((name, False) for name in MODELS), ("electra-projected", True)]
)
def test_against_a_calculation_by_hand(name, task, packed):
    objective = build_objective(name, task)
    sums, found = run_sift(objective, batch_of(task, packed), task)
    expected = by_hand(objective.model, task, first_delta(objective).double())
    assert sums.pop("sift_skipped") == 0
    assert_same(sums, expected)
    assert_same(found, gradients(objective, expected, task))


def test_the_calculation_by_hand_sees_one_ascent_step():
    """A negative control: a step of half the size makes a difference that the test finds."""
    objective = build_objective()
    noise = first_delta(objective).double()
    whole, half = (by_hand(objective.model, "classification", noise, s) for s in (STEP, STEP / 2))
    with pytest.raises(AssertionError):
        assert_same(half, whole)


@pytest.mark.parametrize("task", HEADS)
def test_float32(task):
    """Errs no more than the calculation by hand in float32."""
    wide, narrow = build_objective("v3", task), build_objective("v3", task, torch.float32)
    ours, found = run_sift(narrow, batch_of(task), task)
    ours.pop("sift_skipped")
    noise = first_delta(narrow)
    peer, truth = by_hand(narrow.model, task, noise), by_hand(wide.model, task, noise.double())
    assert_close(ours, peer, truth, torch.float32)
    pair = gradients(narrow, peer, task), gradients(wide, truth, task)
    assert_close(found, *pair, torch.float32)


def test_yes_or_no_logits_are_two_classes():
    entities = Objective(Model(tiny.config(), "entity"))
    several = Objective(Model(tiny.config(problem_type="multi_label_classification"), "sequence"))
    answerable = Objective(Model(tiny.config(), "span"))
    q, p = torch.randn(2, 4, dtype=torch.float64)
    a, b = q.sigmoid(), p.sigmoid()
    expected = ((a - b) * (q - p)).sum()  # The symmetric divergence of two Bernoulli variables.
    for objective, shape in ((entities, (2, 2)), (several, (4, 1)), (answerable, (4,))):
        found = SiFT(objective)._divergence(q.view(shape), p.view(shape))
        torch.testing.assert_close(found, expected)
    masked = torch.full((2, 2), -1e4, dtype=torch.float64, requires_grad=True)
    nothing = SiFT(entities)._divergence(masked, masked.detach() + 1)
    assert nothing == 0 and not torch.autograd.grad(nothing, masked)[0].any()


def test_without_a_perturbation_nothing_diverges():
    sift = SiFT(build_objective()).train()
    sift.noise = torch.zeros_like
    assert abs(sift(batch_of("classification"))["sift_loss"]) < 1e-15


def test_normalising_first_hardly_changes_predictions():
    """What is fine-tuned behind the extra normalisation is used without it."""
    objective, batch = build_objective(), batch_of("classification")
    clean, _ = SiFT(objective)._outputs(batch)
    torch.testing.assert_close(clean, objective.outputs(batch), rtol=1e-4, atol=1e-5)


def test_in_evaluation_the_objective_alone_runs():
    objective, batch = build_objective(), batch_of("classification")
    expected = objective(batch)["loss"]
    assert SiFT(objective).eval()(batch) == {"loss": expected}
    with torch.no_grad():
        assert SiFT(objective).train()(batch) == {"loss": expected}


# What a call leaves behind.


class Broken(Exception):
    pass


class Breaking(Objective):
    """Raises at the stage `stage`."""

    stage = ""
    calls = 0

    def outputs(self, batch):
        self.calls += 1
        if self.stage == f"before pass {self.calls}":
            raise Broken
        (logits,) = super().outputs(batch)
        if self.stage == f"after pass {self.calls}":
            raise Broken
        if self.stage == "gradient" and self.calls == 2:
            logits.register_hook(broken)
        return (logits,)

    def losses(self, batch, outputs):
        if self.stage == "losses":
            raise Broken
        return super().losses(batch, outputs)


def broken(*args):
    raise Broken


STAGES = ["", "losses", "embeddings", "noise", "gradient", "divergence"]
STAGES += [f"{when} pass {i}" for when in ("before", "after") for i in (1, 2, 3)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_leaves_everything_as_it_was(stage, checkpointing):
    objective = Breaking(build_objective().model).train()
    model = objective.model
    model.backbone.encoder.activation_checkpointing = checkpointing
    frozen = model.backbone.encoder.layer[0].output.dense.weight.requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        if i % 3 and parameter is not frozen:
            parameter.grad = torch.full_like(parameter, i)
    held = {name: p.grad for name, p in model.named_parameters()}
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    copies = {name: None if x is None else x.clone() for name, x in held.items()}
    sift = SiFT(objective).train()
    if stage == "noise":
        sift.noise = broken
    if stage == "divergence":
        sift._divergence = broken
    if stage == "embeddings":
        model.backbone.embeddings.LayerNorm.register_forward_pre_hook(broken)
    hooks = hooks_of(model)
    objective.stage = stage
    if stage:
        with pytest.raises(Broken):
            sift(batch_of("classification"))
    else:
        assert sift(batch_of("classification"))["sift_loss"] > 0
    assert hooks_of(model) == hooks
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is held[name]
        assert held[name] is None or torch.equal(held[name], copies[name])


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_without_a_norm_makes_no_step(value):
    class Overflowing(Objective):
        calls = 0

        def outputs(self, batch):
            self.calls += 1
            (logits,) = super().outputs(batch)
            if self.calls % 3 == 2:
                logits.register_hook(lambda g: torch.full_like(g, value))
            return (logits,)

    objective = build_objective()
    batch = batch_of("classification")
    overflowing = Overflowing(objective.model).train()
    sums, found = run_sift(overflowing, batch, "classification")
    assert sums.pop("sift_skipped") == 1
    noise = first_delta(objective).double()
    expected = by_hand(objective.model, "classification", noise, step=0)
    assert_same(sums, expected)
    assert_same(found, gradients(objective, expected, "classification"))


def test_the_ascent_computes_no_gradients_of_weights(monkeypatch):
    """A plain step is three passes' worth of products (one forward, two backward), SiFT's eight:
    the inner backward has only the one for activations."""
    objective, batch = build_objective("electra-projected"), batch_of("classification", packed=True)

    def products(function, loss):
        with FlopCounterMode(display=False) as counter:
            loss(function(batch)).backward()
        return counter.get_total_flops()

    plain = products(objective, lambda sums: sums["loss"])
    ours = products(SiFT(objective).train(), lambda sums: total(sums, 4))
    # A little less: perturbed passes have no gradient in front of the embeddings' LayerNorm.
    assert 2.6 < ours / plain < 8 / 3 + 1e-6

    def wasteful(loss, delta, grad=torch.autograd.grad):
        return grad(loss, [delta, *objective.parameters()], allow_unused=True)[:1]

    monkeypatch.setattr(torch.autograd, "grad", wasteful)
    assert products(SiFT(objective).train(), lambda sums: total(sums, 4)) / plain > 2.8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16(checkpointing):
    objective, batch = (
        build_objective("v3-projected", dtype=torch.float32),
        batch_of("classification"),
    )
    objective.model.backbone.encoder.activation_checkpointing = checkpointing
    exact, _ = run_sift(objective, batch, "classification")
    with torch.autocast("cpu", torch.bfloat16):
        sums, found = run_sift(objective, batch, "classification")
    assert sums["sift_skipped"] == 0 and sums["sift_loss"].dtype == torch.float32
    torch.testing.assert_close(sums["loss"], exact["loss"], rtol=0.05, atol=0)
    assert all(x.isfinite().all() for x in found.values())


def test_the_ascent_climbs():
    """Many times its size up, the step of ascent finds more divergence; downhill, less."""
    objective, batch = build_objective(), batch_of("classification")
    values = []
    for size in (STEP, 1e-2):
        values.append(run_sift(objective, batch, "classification", step_size=size)[0]["sift_loss"])
    assert values[1] > 1.5 * values[0]


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"sigma": -1.0}, {"step_size": 0.0}, {"alpha": float("nan")}]
)
def test_settings_out_of_range(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        SiFT(build_objective(), **settings)


# Runs of the trainer.


class Fixed(SiFT):
    """Its first delta is a function of the embedding: micro-batches and ranks agree on it."""

    def noise(self, embeddings):
        return (10 * embeddings).sin().mul_(2 * self.sigma)


class Classes:
    """Twenty texts of 4 to 13 tokens."""

    title = "SiFT"
    rows = 20

    def __init__(self):
        torch.manual_seed(3)
        model = tiny.randomize(Model(tiny.config(num_labels=LABELS), "sequence"))
        self.sift = Fixed(Objective(model), sigma=0.05)
        self.model: nn.Module = self.sift
        self.texts = [tiny.token_ids(4 + i % 10).roll(i) for i in range(self.rows)]

    def parameter_groups(self):
        return parameter_groups(self.model.parameters(), 2e-3, 0.01)

    def begin(self, step):
        pass

    def batch(self, rows, draws):
        ids, cu_seqlens, longest = pack([self.texts[i] for i in rows.tolist()])
        return Batch(ids, rows % LABELS, None, cu_seqlens, longest)

    def counts(self, batch):
        return {"loss": float(len(batch.labels)), **self.sift.counts(len(batch.labels))}

    def weights(self, step):
        return {"loss": 1.0, **self.sift.weights()}

    def tokens(self, batch):
        return len(batch.input_ids)

    def compute(self, batch):
        return 0.0

    def evaluate(self):
        return {}

    def export(self, directory):
        pass


def run(output, **changes) -> dict[tuple[int, str], float]:
    """Every loss, by step and name."""
    settings = {"device": "cpu", "steps": 6, "batch_size": 7, "warmup_steps": 2, "log_every": 1}
    settings |= {"evaluate_every": 0, "checkpoint_every": 0, "output": str(output)}
    Trainer(Classes(), build(TrainSettings, settings | changes)).run()
    return curve(output)


def curve(output) -> dict[tuple[int, str], float]:
    lines = read_metrics(Path(output) / "metrics.jsonl")
    kinds = ("loss", "sift_", "grad_norm/")
    return {(x["step"], n): x[n] for x in lines for n in x if n.startswith(kinds)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"))


def assert_same_curve(ours, expected):
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_run_logs_skipped_steps(alone):
    assert {name for _, name in alone} == {"loss", "sift_loss", "sift_skipped", "grad_norm/model"}
    assert {alone[step, "sift_skipped"] for step in range(1, 7)} == {0.0}
    assert all(alone[step, "sift_loss"] > 1e-3 for step in range(1, 7))


@pytest.mark.parametrize(
    "changes",
    [{"accumulation": 3}, {"activation_checkpointing": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_micro_batches_and_checkpointing_change_nothing(changes, alone, tmp_path):
    assert_same_curve(run(tmp_path, **changes), alone)


def test_two_processes_have_the_losses_of_one(alone, tmp_path):
    """As replicas and as shards, in micro-batches with checkpointed layers."""
    parts = "accumulation=2,activation_checkpointing=true"
    kinds = {"ddp": parts, "fsdp": f"parallel=fsdp,{parts}"}
    runs = [f"{tmp_path / name}:{changes}" for name, changes in kinds.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", __file__, *runs],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )
    assert done.returncode == 0, done.stderr
    for name in kinds:
        assert_same_curve(curve(tmp_path / name), alone)


if __name__ == "__main__":
    for argument in sys.argv[1:]:  # Each a run: OUTPUT:KEY=VALUE,...
        output, pairs = argument.split(":")
        run(output, **apply_overrides({}, filter(None, pairs.split(","))))
