"""The training engine: settings, schedule, groups, metrics, and runs that end and go on."""

import io
import json
import math
import os
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from fastdeberta.models import Model
from fastdeberta.training import Diverged, Interrupted, Trainer, TrainSettings, checkpoint
from fastdeberta.training.distributed import resolve_device
from fastdeberta.training.draws import Draws
from fastdeberta.training.optimizer import (
    LossScaler,
    clip_gradients,
    learning_rate_fraction,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from fastdeberta.training.reporting import BarProgress, MetricsFile, PlainProgress, read_metrics
from fastdeberta.training.settings import apply_overrides, build, load_yaml, to_yaml

# Settings


@dataclass
class Settings(TrainSettings):
    """Every kind of field."""

    name: str | None = None
    rate: float | None = None
    parts: dict[str, Any] = field(default_factory=dict)


def test_build():
    values = {"learning_rate": "2e-3", "steps": 7, "rate": 1, "name": None, "parts": {"a": 1}}
    settings = build(Settings, values)
    assert settings.learning_rate == 2e-3 and settings.steps == 7
    assert settings.rate == 1.0 and isinstance(settings.rate, float)
    assert settings.name is None and settings.parts == {"a": 1}
    assert settings.batch_size == TrainSettings.batch_size


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "unknown config key 'learning_rat'; did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown config key 'zzz'$"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"steps": 1.5}, "steps must be int, got 1.5"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": None}, "steps must be int, got None"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"learning_rate": False}, "learning_rate must be float, got False"),
        ({"rate": [1]}, r"rate must be float or NoneType, got \[1\]"),
        ({"output": 7}, "output must be str, got 7"),
        ({"parts": []}, "parts must be dict"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"evaluate_every": -1}, "evaluate_every must not be negative, got -1"),
        ({"checkpoint_every": -5}, "checkpoint_every must not be negative, got -5"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be positive, got 0"),
        ({"epsilon": 0}, "epsilon must be positive, got 0"),
        ({"schedule": "step"}, "schedule must be one of linear, constant, cosine, google; got 's"),
        ({"parallel": "tp"}, "parallel must be one of ddp, fsdp; got 'tp'"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"accumulation": 9, "batch_size": 8}, "accumulation must be at most batch_size = 8, got"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"beta1": -0.1}, r"beta1 must be in \[0, 1\), got -0.1"),
        ({"compile": 1}, "compile must be bool, got 1"),
        ({"bias_correction": "no"}, "bias_correction must be bool, got 'no'"),
        ({"activation_checkpointing": None}, "activation_checkpointing must be bool, got None"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(ValueError, match=message):
        build(Settings, values)


def test_overrides():
    values = {"a": 1, "b": {"c": 2, "d": 3}}
    pairs = ["a=2e-3", "b.c=[1, 2]", "e.f.g=x", "h=", "i=null", "j=a=b", "k=true"]
    assert apply_overrides(values, pairs) == {
        "a": "2e-3",
        "b": {"c": [1, 2], "d": 3},
        "e": {"f": {"g": "x"}},
        "h": None,
        "i": None,
        "j": "a=b",
        "k": True,
    }


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("a", "expected key=value, got 'a'"),
        ("=1", "expected key=value, got '=1'"),
        ("a.b=1", "a.b: 'a' holds a value, not keys"),
        ("b=[", r"b: '\[' is not a YAML value"),
    ],
)
def test_wrong_overrides(pair, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides({"a": 1}, [pair])


def test_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    settings = build(Settings, {"steps": 7, "parts": {"b": 1, "a": [1, None]}})
    path.write_text(to_yaml(settings))
    assert build(Settings, load_yaml(path)) == settings
    path.write_text("# nothing\n")
    assert load_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "config.yaml is not valid YAML: "),
        (b"a: \xff", "config.yaml is not valid YAML: "),
        (b"- a", "config.yaml must hold key: value pairs"),
    ],
)
def test_wrong_yaml(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such config file: "):
        load_yaml(tmp_path)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device: no 'nope' here: "):
        resolve_device("nope")


# Optimiser and schedule


def test_learning_rate():
    fractions = [learning_rate_fraction(step, 4, 12) for step in range(13)]
    assert fractions == [0.25, 0.5, 0.75, 1, 1, 7 / 8, 6 / 8, 5 / 8, 0.5, 3 / 8, 0.25, 1 / 8, 0]
    assert learning_rate_fraction(0, 0, 10) == 1
    assert learning_rate_fraction(0, 1, 1) == 1
    assert all(0 < learning_rate_fraction(step, 20, 10) <= 0.5 for step in range(10))


def test_schedules():
    """Each against its formula, as its source writes it."""
    steps, warmup = 12, 4
    for step in range(steps):
        of = {
            name: learning_rate_fraction(step, warmup, steps, name)
            for name in ("constant", "cosine", "google")
        }
        rise = min(1.0, (step + 1) / warmup)
        done = max(0, step - warmup) / (steps - warmup)
        assert of["constant"] == rise
        expected = rise if step < warmup else (1 + math.cos(math.pi * done)) / 2
        assert of["cosine"] == pytest.approx(expected)
        assert of["google"] == pytest.approx((1 - step / steps) * min(1.0, step / warmup))
    assert learning_rate_fraction(0, 4, 12, "google") == 0
    assert max(learning_rate_fraction(s, 4, 12, "google") for s in range(12)) < 0.67
    assert learning_rate_fraction(0, 0, 12, "google") == 1


@pytest.mark.parametrize("corrected", [True, False])
def test_bias_correction(corrected):
    """AdamW written out; a vector has no decay."""
    settings = TrainSettings(bias_correction=corrected, beta1=0.8, beta2=0.9, epsilon=1e-3)
    matrix, vector = (nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,)))
    optimizer = make_optimizer(parameter_groups([matrix, vector], 0.1, 0.3), settings)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter, decay in ((matrix, 0.3), (vector, 0.0)):
        values = parameter.detach().double()
        first, second = torch.zeros_like(values), torch.zeros_like(values)
        for step in range(1, 4):
            gradient = torch.randn_like(parameter)
            optimizer.zero_grad()
            parameter.grad = gradient
            optimizer.step()
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient.double().square()
            a, b = (1 - 0.8**step, 1 - 0.9**step) if corrected else (1, 1)
            values = values - 0.1 * (first / a / ((second / b).sqrt() + 1e-3) + decay * values)
            torch.testing.assert_close(parameter.detach().double(), values, rtol=1e-5, atol=1e-6)


def test_loss_scale():
    scaler = LossScaler(True)
    start = scaler.scale
    for finite in (False, True, False):
        scaler.update(finite)
    assert scaler.scale == start / 4 and scaler.skipped == 2
    for _ in range(2000):
        scaler.update(True)
    assert scaler.scale == start / 2
    scaler.update(True)
    again = LossScaler(True)
    again.load(json.loads(json.dumps(scaler.state())))
    assert again.state() == scaler.state() and again.good_steps == 1
    none = LossScaler(False)
    none.update(False)
    assert none.scale == 1.0 and none.skipped == 0


def test_scaled_gradients_are_divided_before_they_are_clipped():
    parameter = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer(parameter_groups([parameter], 0.1, 0.0), TrainSettings())
    parameter.grad = torch.full((2, 2), 8.0)
    assert clip_gradients(optimizer, 100.0, scale=16.0)["model"].item() == 1.0
    assert torch.equal(parameter.grad, torch.full((2, 2), 0.5))


# Draws


def test_draws_do_not_depend_on_the_division():
    whole = Draws(3, 5, 0, 12, 12)
    expected = [whole.uniform(7), whole.uniform(7), whole.uniform(), whole.uniform(4, 3)]
    assert [x.shape for x in expected] == [(12, 7), (12, 7), (12,), (12, 4, 3)]
    assert all(x.dtype == torch.float32 and x.min() >= 0 and x.max() < 1 for x in expected)
    for first, count in ((0, 5), (5, 1), (6, 6)):
        part = Draws(3, 5, first, count, 12)
        for shape, numbers in zip(((7,), (7,), (), (4, 3)), expected, strict=True):
            assert torch.equal(part.uniform(*shape), numbers[first : first + count])
    longer = Draws(3, 5, 0, 12, 12).uniform(9)
    assert torch.equal(longer[:, :7], expected[0]), "nor on padding"


def test_draws_differ():
    """From row to row, call to call, step to step and seed to seed."""
    numbers = [Draws(seed, step, 0, 3, 3) for seed in range(3) for step in range(3)]
    drawn = torch.cat([draws.uniform(50) for draws in numbers for _ in range(2)])
    assert len(drawn.unique(dim=0)) == len(drawn)
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6  # Of 50 numbers: beyond four standard deviations.
    many = Draws(0, 0, 0, 100, 100).uniform(1000)
    counts = torch.histc(many, 10, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 30


def test_every_group_keeps_its_rate():
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    groups = parameter_groups(parameters[:1], 0.1, 0.0) + parameter_groups(parameters[1:], 0.3, 0.0)
    settings = TrainSettings(steps=12, warmup_steps=4, beta1=0.8, beta2=0.95, epsilon=1e-5)
    optimizer = make_optimizer(groups, settings)
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["eps"] == 1e-5
    set_learning_rate(optimizer, 1, settings)
    rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
    assert rates == pytest.approx([0.05, 0.15])


def test_a_group_may_have_its_own_course():
    first, second = (
        {"params": [nn.Parameter(torch.zeros(2, 2))], "peak_lr": 1.0, "network": name} | own
        for name, own in (
            ("first", {"steps": 4, "warmup_steps": 2, "max_grad_norm": 0.5}),
            ("second", {"first_step": 4, "steps": 8, "warmup_steps": 0, "schedule": "constant"}),
        )
    )
    settings = TrainSettings(steps=12, warmup_steps=4, max_grad_norm=2.0)
    optimizer = make_optimizer([first, second], settings)
    rates = []
    for step in range(12):
        set_learning_rate(optimizer, step, settings)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [r[0] for r in rates] == [0.5, 1, 1, 0.5] + 8 * [0]
    assert [r[1] for r in rates] == 4 * [0] + 8 * [1]
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.full((2, 2), 5.0)
    clip_gradients(optimizer, settings.max_grad_norm)
    norms = [group["params"][0].grad.norm().item() for group in optimizer.param_groups]
    assert norms == pytest.approx([0.5, 2.0], rel=1e-4)


def test_no_decay_on_biases_and_layernorm():
    model = Model(tiny.config(conv_kernel_size=3), "mlm")
    model.head.dense.weight.requires_grad_(False)
    groups = parameter_groups(model.parameters(), 0.1, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == set(names.values()) - {"head.dense.weight"}
    for name, value in decay.items():
        plain = "LayerNorm" in name or name.endswith("bias")
        assert value == (0.0 if plain else 0.01), name


def test_gradients_are_clipped_by_network():
    a, b, c = (nn.Parameter(torch.zeros(n, 2)) for n in (1, 2, 3))
    groups = parameter_groups([a, b], 0.1, 0.0, "one") + parameter_groups([c], 0.1, 0.0, "two")
    for parameter, value in ((a, 3.0), (b, 4.0), (c, 0.1)):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    norms = clip_gradients(make_optimizer(groups, TrainSettings()), 1.0)
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(
        {"one": 5.0, "two": 0.1}
    )
    got = [p.grad[0, 0].item() for p in (a, b, c)]
    assert got == pytest.approx([3 / 5, 4 / 5, 0.1], rel=1e-4)


# What a run says


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(tmp_path, 0)
    for step in (1, 2, 2, 3):
        metrics.write(step, {"loss": 1 / step})
    metrics.close()
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3]
    for half in ("", '{"step": 4, "lo', '{"step": 2, "loss": 0.'):
        path.write_text("".join(lines) + half)
        assert len(read_metrics(path)) == 4
        metrics = MetricsFile(tmp_path, 2)
        assert path.read_text() == "".join(lines[:3])
        metrics.write(3, {"loss": 1 / 3})
        metrics.close()
        assert path.read_text() == "".join(lines)
    MetricsFile(tmp_path, 0).close()
    assert path.read_text() == ""


def test_plain_progress(capsys):
    progress = PlainProgress(interval=1e6)
    progress.start("training", 0, 3)
    for step in (1, 2, 3):
        progress.update(step, f"loss {step}")
    progress.stop()
    (line,) = capsys.readouterr().out.splitlines()  # The last step is always said.
    assert line.startswith("training 3/3  ") and line.endswith("  0:00 left  loss 3")
    progress.interval = 0
    progress.start("training", 10, 13)
    progress.update(11, "")
    assert capsys.readouterr().out.startswith("training 11/13  ")


# A small task


class Fit(nn.Module):
    """The squared errors of a line, summed; it says when it is called."""

    def __init__(self, happen):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.happen = happen

    def forward(self, batch):
        predicted = self.net(batch["x"])
        self.happen(("loss", batch["step"]), torch.is_autocast_enabled("cpu"))
        error = predicted.float() - batch["x"].sum(1, keepdim=True)
        return {"error": error.square().sum(), "mean": predicted.sum()}


class Line:
    """Fits a line, with dropout; everything is a function of the step and torch's seed."""

    title = "fitting"
    rows = 64

    def __init__(self):
        torch.manual_seed(7)
        self.model = Fit(self.happen)
        self.events, self.on, self.autocast, self.step = [], {}, set(), None
        self.taken = []

    def happen(self, event, autocast=None):
        """Records what the trainer asks for, and fails or signals where a test wants it to."""
        self.events.append(event)
        if autocast is not None:
            self.autocast.add(autocast)
        for function in [self.on[event]] if event in self.on else []:
            function()

    def parameter_groups(self):
        return parameter_groups(self.model.parameters(), 0.01, 0.01)

    def begin(self, step):
        self.step = step

    def batch(self, rows, draws):
        self.happen(("batch", self.step))
        self.taken.append(rows)
        numbers = draws.uniform(2, 4)
        return {"x": numbers[:, 0] - numbers[:, 1] + rows[:, None] / 64, "step": self.step}

    def counts(self, batch):
        return {"error": len(batch["x"]), "mean": len(batch["x"])}

    def weights(self, step):
        return {"error": 1.0}

    def tokens(self, batch):
        return batch["x"].size(0)

    def compute(self, batch):
        return 100.0 * batch["x"].size(0)

    def evaluate(self):
        self.happen(("evaluate", sum(e[0] == "evaluate" for e in self.events)))
        assert not self.model.training and not torch.is_grad_enabled()
        x = torch.randn(64, 4)
        return {"error": float((self.model.net(x) - x.sum(1, keepdim=True)).square().mean())}

    def export(self, directory):
        (directory / "first").touch()
        self.happen(("export", sum(e[0] == "export" for e in self.events)))
        (directory / "second").touch()


TIMING = {
    "train_seconds", "tokens_per_second", "peak_flops_per_second", "model_flops_utilization"
}  # fmt: skip
RUN = {
    "device": "cpu",
    "steps": 20,
    "batch_size": 16,
    "warmup_steps": 3,
    "log_every": 3,
    "evaluate_every": 5,
    "checkpoint_every": 4,
    "learning_rate": 0.01,
}


def trainer_of(output, task=None, progress=None, **changes):
    settings = build(Settings, {"output": str(output), **RUN, **changes})
    return Trainer(task or Line(), settings, progress)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: its result, its weights, the bytes of its metrics."""
    torch.manual_seed(99)  # A run must not depend on what was drawn before it.
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    result = trainer.run()
    return result, weights(trainer), (trainer.output / "metrics.jsonl").read_bytes()


def assert_like_whole(trainer, result, whole):
    expected, parameters, metrics = whole
    assert {k: v for k, v in result.items() if k not in TIMING} == {
        k: v for k, v in expected.items() if k not in TIMING
    }
    assert torch.equal(weights(trainer), parameters)
    assert (trainer.output / "metrics.jsonl").read_bytes() == metrics


def test_a_run(whole, tmp_path):
    task = Line()
    trainer = trainer_of(tmp_path, task)
    result = trainer.run()
    assert_like_whole(trainer, result, whole)
    assert result["step"] == 20 and result["tokens"] == 320 and result["train_seconds"] >= 0
    assert [e for e in task.events if e[0] == "batch"] == [("batch", i) for i in range(20)]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    errors = {x["step"]: x["held_out/error"] for x in lines if "held_out/error" in x}
    assert list(errors) == [5, 10, 15, 20] and errors[20] == result["error"] < errors[5]
    assert set(lines[0]) == {
        "step", "loss", "error", "mean", "grad_norm/model", "learning_rate", "tokens", "flops"
    }  # fmt: skip
    assert lines[-2]["flops"] == result["flops"] == 32_000
    assert lines[0]["learning_rate"] == 0.01 and lines[0]["tokens"] == 48
    assert build(Settings, load_yaml(tmp_path / "config.yaml")) == trainer.settings
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-20"]
    assert (tmp_path / "checkpoint-20" / "second").exists()


def test_logged_values_are_means_since_the_last_line(tmp_path):
    task, losses = Line(), []
    forward = task.model.forward

    def recorded(batch):
        terms = forward(batch)
        losses.append(terms["error"].item() / 16)
        return terms

    task.model.forward = recorded
    trainer_of(tmp_path, task, steps=7).run()
    lines = [x["loss"] for x in read_metrics(tmp_path / "metrics.jsonl") if "loss" in x]
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]]
    assert lines == pytest.approx(means)


def test_a_complete_run_trains_no_more(whole, tmp_path):
    trainer_of(tmp_path).run()
    task = Line()
    trainer = trainer_of(tmp_path, task)
    assert_like_whole(trainer, trainer.run(), whole)
    assert [event[0] for event in task.events] == ["evaluate"]


@pytest.mark.parametrize(("keep", "kept"), [(1, [20]), (3, [12, 16, 20]), (9, [4, 8, 12, 16, 20])])
def test_keep_checkpoints(keep, kept, tmp_path):
    trainer_of(tmp_path, keep_checkpoints=keep).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in kept]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", ".checkpoint-3.writing-7"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_zero_means_at_the_end_only(tmp_path):
    trainer_of(tmp_path, evaluate_every=0, checkpoint_every=0).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-20"]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [x["step"] for x in lines if "held_out/error" in x] == [20]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision(precision, tmp_path):
    task = Line()
    result = trainer_of(tmp_path, task, precision=precision).run()
    assert task.autocast == {precision == "bf16"}
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert math.isfinite(result["error"])


class Overflow(torch.autograd.Function):
    """Nothing forward; gradients without bound backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def overflowing(steps):
    """A task whose gradients overflow at some steps."""
    task = Line()
    forward = task.model.forward

    def changed(batch):
        terms = forward(batch)
        overflow = batch["step"] in steps
        return terms | {"error": Overflow.apply(terms["error"])} if overflow else terms

    task.model.forward = changed
    return task


def test_fp16_skips_what_overflows(tmp_path):
    trainer = trainer_of(tmp_path / "a", overflowing({4, 5, 12}), precision="fp16")
    before = weights(trainer)
    result = trainer.run()
    assert result["step"] == 20 and not torch.equal(weights(trainer), before)
    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    skipped = [x["skipped_steps"] for x in lines if "loss" in x]
    first = skipped[0]  # The scale starts too high.
    assert first < 6 and skipped == [first + n for n in (0, 2, 2, 2, 3, 3, 3)]
    assert trainer.scaler.scale == 2.0 ** (16 - skipped[-1])
    task = overflowing({4, 5, 12})
    task.on["batch", 14] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", task, precision="fp16").run()
    again = trainer_of(tmp_path / "b", overflowing({12}), precision="fp16")
    assert again.run()["error"] == result["error"]
    assert again.scaler.state() == trainer.scaler.state()


def test_overflow_is_divergence_elsewhere_and_in_the_end(tmp_path):
    with pytest.raises(Diverged, match="step 5: .*grad_norm/model': (inf|nan)"):
        trainer_of(tmp_path / "a", overflowing({4})).run()
    with pytest.raises(Diverged, match="step 31: .*grad_norm/model': (inf|nan)"):
        trainer_of(tmp_path / "b", overflowing(range(90)), precision="fp16", steps=90).run()


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_accumulation(parts, tmp_path):
    """Without dropout, micro-batches change nothing."""
    results = []
    for count in (1, parts):
        task = Line()
        task.model.net[1].p = 0.0
        trainer = trainer_of(tmp_path / f"{count}", task, accumulation=count)
        results.append((trainer.run()["error"], weights(trainer), torch.cat(task.taken)))
        assert len(task.taken) == 20 * count
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][2], results[1][2])


def test_averaged_weights_are_judged(tmp_path):
    decay, averaged, seen = 0.8, None, []
    task = Line()
    trainer = trainer_of(tmp_path / "a", task, ema=decay, evaluate_every=1)
    averaged = weights(trainer).clone()
    step = trainer.optimizer.step

    def stepped():
        step()
        averaged.lerp_(weights(trainer), 1 - decay)

    trainer.optimizer.step = stepped
    evaluate = task.evaluate
    task.evaluate = lambda: [seen.append((weights(trainer), averaged.clone())), evaluate()][1]
    result = trainer.run()
    for judged, expected in seen:
        torch.testing.assert_close(judged, expected, rtol=1e-5, atol=1e-7)
    assert len(seen) == 20
    torch.testing.assert_close(weights(trainer), averaged, rtol=1e-5, atol=1e-7)

    task = Line()
    task.on["batch", 14] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path / "b", task, ema=decay, evaluate_every=1).run()
    again = trainer_of(tmp_path / "b", Line(), ema=decay, evaluate_every=1)
    assert_like_whole(
        again, again.run(), (result, weights(trainer), (tmp_path / "a/metrics.jsonl").read_bytes())
    )


def test_activation_checkpointing():
    """The same gradients; layers run twice, in training alone."""
    model = tiny.randomize(
        Model(tiny.config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), "mlm")
    )
    calls = []
    model.backbone.encoder.layer[1].register_forward_pre_hook(lambda *_: calls.append(1))
    ids, results = tiny.token_ids(2, 9), []
    for on in (False, True):
        model.backbone.encoder.activation_checkpointing = on
        model.train().zero_grad()
        torch.manual_seed(0)
        calls.clear()
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + on
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        calls.clear()
        with torch.no_grad():
            model.eval()(ids)
        assert len(calls) <= 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_compiled(tmp_path):
    """The same losses from compiled code; inductor needs a C++ compiler."""
    results = []
    for compiled in (False, True):
        task = Line()
        task.model.net[1].p = 0.0
        task.model.happen = lambda *_: None
        trainer = trainer_of(tmp_path / f"{compiled}", task, compile=compiled)
        results.append(trainer.run()["error"])
        assert (task.model._compiled_call_impl is not None) == compiled
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_a_run_may_go_on_with_other_micro_batches(tmp_path):
    task = Line()
    task.on["batch", 9] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path, task).run()
    assert trainer_of(tmp_path, accumulation=2).run()["step"] == 20


def test_compute_is_counted_over_the_whole_run(tmp_path):
    task = Line()
    task.on["batch", 9] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path, task).run()
    result = trainer_of(tmp_path).run()
    assert result["flops"] == 20 * 16 * 100.0
    state = json.loads((tmp_path / "checkpoint-20" / "state.json").read_text())
    rate = result["flops"] / state["seconds"]
    utilization = rate / result["peak_flops_per_second"]
    assert result["model_flops_utilization"] == pytest.approx(utilization, rel=1e-6)
    assert state["flops"] == result["flops"] and state["parameters"] == 4 * 8 + 8 + 8 + 1


def test_measure_leaves_nothing(tmp_path):
    assert 0 < trainer_of(tmp_path / "run").measure(3) < 10
    assert not (tmp_path / "run").exists()


# Runs that end early


class Killed(BaseException):
    """Ends a run anywhere, as a kill would."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    "event",
    [("batch", 0), ("batch", 4), ("loss", 10), ("batch", 19), ("evaluate", 0), ("evaluate", 2)]
    + [("export", i) for i in range(5)],
    ids=lambda event: "-".join(map(str, event)),
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(event, whole, tmp_path):
    task = Line()
    task.on[event] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path, task).run()
    for path in checkpoint.checkpoints(tmp_path):
        assert {p.name for p in path.iterdir()} == {
            "first", "second", "state.json", "training.safetensors", "optimizer.pt"
        }  # fmt: skip
    again = Line()
    trainer = trainer_of(tmp_path, again)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')  # What the kill cut short.
    assert_like_whole(trainer, trainer.run(), whole)
    repeated = [e for e in again.events if e[0] == "batch"]
    assert len(repeated) <= 20 and (event[0] == "batch" or len(repeated) < 20 or event[1] == 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint(number, whole, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    task = Line()
    task.on["loss", 6] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match=f"{number.name}: stopped after step 7; saved .*point-7"):
        trainer_of(tmp_path, task).run()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-7"]
    trainer = trainer_of(tmp_path)
    assert_like_whole(trainer, trainer.run(), whole)


def test_a_signal_in_the_last_step_is_too_late(whole, tmp_path):
    task = Line()
    task.on["loss", 19] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    trainer = trainer_of(tmp_path, task)
    assert_like_whole(trainer, trainer.run(), whole)


def test_a_second_signal_is_final(tmp_path):
    task = Line()
    task.on["loss", 6] = lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, task).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_resumed_run_says_so_on_a_bar(whole, tmp_path):
    task, progress = Line(), BarProgress()
    task.on["batch", 9] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path, task, progress).run()
    progress = BarProgress()
    progress._console.file = io.StringIO()
    trainer = trainer_of(tmp_path, None, progress)
    assert_like_whole(trainer, trainer.run(), whole)
    said = progress._console.file.getvalue().replace("\n", "")
    assert said.startswith(f"resuming {tmp_path} after step 8".replace("\n", ""))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 30}, r"steps: 20 there, 30 now"),
        ({"parts": {"a": 1}}, r"parts: \{\} there, \{'a': 1\} now"),
    ],
)
def test_other_settings_in_the_same_output(changes, message, tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.run()
    config = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=f"holds a run with other settings .{message}"):
        trainer_of(tmp_path, None, BarProgress(), **changes).run()
    assert (tmp_path / "config.yaml").read_text() == config


def test_a_run_without_a_checkpoint_may_change_its_settings(tmp_path):
    task = Line()
    task.on["batch", 2] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path, task).run()
    assert trainer_of(tmp_path, steps=2).run()["step"] == 2


def test_a_moved_run_goes_on(whole, tmp_path):
    task = Line()
    task.on["batch", 9] = kill
    with pytest.raises(Killed):
        trainer_of(tmp_path / "here", task).run()
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = trainer_of(tmp_path / "there")
    assert_like_whole(trainer, trainer.run(), whole)


@pytest.mark.parametrize(
    ("step", "kept"), [(10, "the last checkpoint is .*checkpoint-8"), (2, "no")]
)
def test_divergence(step, kept, tmp_path):
    task = Line()
    task.on["batch", step] = lambda: task.model.net[0].weight.data.fill_(math.nan)
    with pytest.raises(Diverged, match=f"step {step + 1}: .*'loss': nan.*learning_rate.*; {kept}"):
        trainer_of(tmp_path, task).run()
    found = checkpoint.checkpoints(tmp_path)
    assert [p.name for p in found] == (["checkpoint-4", "checkpoint-8"] if step == 10 else [])
    assert all(line["step"] <= step for line in read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("name", ["training.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_damaged_checkpoint(name, size, tmp_path):
    trainer_of(tmp_path, steps=4).run()
    path = tmp_path / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size // 2)])
    with pytest.raises(ValueError, match="checkpoint-4 is damaged or of another model: ") as caught:
        trainer_of(tmp_path, steps=4).run()
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_model(tmp_path):
    trainer_of(tmp_path, steps=4).run()
    task = Line()
    task.model.net = nn.Linear(4, 1)
    with pytest.raises(ValueError, match="checkpoint-4 is damaged or of another model: "):
        trainer_of(tmp_path, task, steps=4).run()
