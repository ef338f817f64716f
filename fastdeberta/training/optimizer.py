"""AdamW's parameter groups, the learning rate's course, and the scale of half-precision losses."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import TrainSettings

# In place of the number of steps, where 1 - beta ** steps must be one.
_ENDLESS = 1e9


def parameter_groups(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    network: str = "model",
) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases, LayerNorm and other vectors without.

    Gradients are clipped to one norm for each `network`, so that one network's loss weight does
    not shrink another's steps.
    """
    parameters = [p for p in parameters if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    plain = [p for p in parameters if p.dim() <= 1]
    common = {"peak_lr": learning_rate, "network": network}
    return [
        {"params": decayed, "weight_decay": weight_decay, **common},
        {"params": plain, "weight_decay": 0.0, **common},
    ]


def make_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over groups that carry a `peak_lr`; without bias correction if the settings say so.

    Source: Loshchilov and Hutter 2019; without bias correction: google-research/electra.
    """
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    if not settings.bias_correction:
        # The corrections, 1 - beta ** step, are one from the start when the count of steps is.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p] = {
                    "step": torch.tensor(_ENDLESS, dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
    return optimizer


def clip_gradients(
    optimizer: torch.optim.Optimizer, max_norm: float, scale: float = 1.0
) -> dict[str, Tensor]:
    """Divides gradients by `scale`, clips each network's to max_norm, or to its groups' own
    `max_grad_norm`; returns the norms they had."""
    networks: dict[str, list[Tensor]] = {}
    limits: dict[str, float] = {}
    for group in optimizer.param_groups:
        networks.setdefault(group["network"], []).extend(group["params"])
        limits[group["network"]] = group.get("max_grad_norm", max_norm)
    if scale != 1.0:
        grads = [p.grad for ps in networks.values() for p in ps if p.grad is not None]
        torch._foreach_mul_(grads, 1 / scale)
    return {name: nn.utils.clip_grad_norm_(ps, limits[name]) for name, ps in networks.items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, settings: TrainSettings) -> None:
    """Sets every group's rate for `step`, from 0.

    A group may have its own `warmup_steps`, `schedule` and `steps`, counted from its own
    `first_step`; outside of them its rate is zero.
    """
    for group in optimizer.param_groups:
        own = step - group.get("first_step", 0)
        steps = group.get("steps", settings.steps)
        fraction = 0.0
        if 0 <= own < steps:
            warmup = group.get("warmup_steps", settings.warmup_steps)
            schedule = group.get("schedule", settings.schedule)
            fraction = learning_rate_fraction(own, warmup, steps, schedule)
        group["lr"] = group["peak_lr"] * fraction


def learning_rate_fraction(step: int, warmup: int, steps: int, schedule: str = "linear") -> float:
    """The fraction of the peak at `step`, from 0.

    "linear", "cosine" and "constant" rise over `warmup` steps, then fall in a line or half a
    cosine that reaches zero after `steps`, or stay. "google" multiplies the rise with a fall that
    starts at the first step, so that the peak is never reached and the first step is of rate zero
    (google-research/electra and bert).
    """
    if schedule == "google":
        return (1 - step / steps) * (min(1.0, step / warmup) if warmup else 1.0)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warmup)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


class LossScaler:
    """The factor that keeps fp16 gradients from vanishing: halved when they overflow, doubled
    after 2000 steps without.

    Every rank decides by the norm that all of them share, so that no rank skips a step alone.

    Source: Micikevicius et al. 2018, section 3.2.
    """

    GROWTH_STEPS = 2000

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.good_steps = 0
        self.skipped = 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good_steps = self.scale / 2, 0
            self.skipped += 1
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]
        self.skipped = state["skipped"]
