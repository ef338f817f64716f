"""AdamW's parameter groups, and the learning rate's course."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import TrainSettings


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
    """AdamW over groups that carry a `peak_lr`."""
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> dict[str, Tensor]:
    """Clips each network's gradients to max_norm; returns the norms they had."""
    networks: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        networks.setdefault(group["network"], []).extend(group["params"])
    return {name: nn.utils.clip_grad_norm_(ps, max_norm) for name, ps in networks.items()}


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, settings: TrainSettings
) -> float:
    """Sets every group's rate for `step` (from 0); returns the fraction of the peak."""
    fraction = learning_rate_fraction(step, settings.warmup_steps, settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction
    return fraction


def learning_rate_fraction(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up over `warmup` steps, then linear decay that reaches zero after `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)
