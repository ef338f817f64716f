"""Scale-invariant fine-tuning: predictions that hold when the embeddings are perturbed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, log_softmax, pad

from ..models import Model
from ..models.answers import wide

NORM_EPS = 1e-7  # of the normalisation in front of the perturbation
SCALE_EPS = 1e-6  # added to a token's largest gradient, by which the others are divided


class SiFT(nn.Module):
    """An objective whose loss gains alpha * divergence of clean and perturbed predictions.

    What enters the embeddings' LayerNorm is first normalised to zero mean and unit variance over
    its features, in every pass. DeBERTa's embedding projection comes before that point, ELECTRA's
    after it; position and type embeddings, where the family adds them, are part of what is
    normalised. Then, in each forward call:

    1. a clean pass gives the task's losses and logits p;
    2. delta is drawn from normal(0, sigma), clipped at 2 sigma, in float32;
    3. a pass on the detached normalised embeddings plus delta, and one step of gradient ascent:
       delta += step_size * g / (1e-6 + max |g|), the maximum over a token's features, where g is
       the gradient of the divergence from p, summed over the batch. A step of which g's norm is
       infinite or NaN is left out and counted;
    4. a last pass on the detached normalised embeddings plus delta gives logits q.

    The divergence is KL(p, q) + KL(q, p), the first of each pair without a gradient, so that both
    passes learn; for regression (p - q)**2. Yes/no logits (entities, several labels at once, a
    span's answerability) are two classes. Dropout is drawn anew in each of the three passes.

    Nothing is changed in the model: the gradient of delta is taken alone, and the hook that puts
    delta in lives for one pass. Padding has no delta: it is left out before the embeddings, or no
    logit depends on it.

    In evaluation mode or without gradients the objective alone runs.

    Args:
        objective: has `model`, a fastdeberta Model; `outputs(batch)`, one forward pass, which gives
            a tuple of logits: [N, classes], regression [N, 1], choice [N, options], span two
            [N, L] (masked entries large and finite), tagging [scored tokens, classes]; and
            `losses(batch, outputs)`, each loss's sum by name. N counts examples.
        alpha: the divergence's weight in the loss; see `weights`.
        sigma: standard deviation of the first delta.
        step_size: the largest change of an element of delta by the ascent step.

    Raises:
        ValueError: alpha, sigma or step_size is not positive.

    Source: DeBERTa, section 4; microsoft/DeBERTa, which scores regression by no divergence at all
    (a single logit has one class) and adds the entropies, constants here, to the logged value.
    """

    def __init__(
        self, objective: Any, alpha: float = 5.0, sigma: float = 1e-2, step_size: float = 1e-4
    ):
        super().__init__()
        for name, value in (("alpha", alpha), ("sigma", sigma), ("step_size", step_size)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.objective = objective
        self.alpha, self.sigma, self.step_size = alpha, sigma, step_size

    def weights(self) -> dict[str, float]:
        """What `Task.weights` gains. sift_skipped is not among them: it is only logged."""
        return {"sift_loss": self.alpha}

    def counts(self, rows: float) -> dict[str, float]:
        """What `Task.counts` gains for a micro-batch whose outputs have so many rows: examples, or
        a tagger's scored tokens. Of entities: those that are not padding.

        sift_skipped over its count is the share of ascent steps that were left out.
        """
        return {"sift_loss": rows, "sift_skipped": 1.0}

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The task's sums; sift_loss, the divergences' sum over rows (the mean over outputs, of a
        span's start and end); sift_skipped, 1 if the ascent step was left out."""
        if not (self.training and torch.is_grad_enabled()):
            return self.objective(batch)
        clean, embeddings = self._outputs(batch)
        sums = self.objective.losses(batch, clean)
        embeddings = embeddings.detach()
        delta = self.noise(embeddings)
        delta, skipped = self._ascend(batch, clean, embeddings, delta)
        perturbed, _ = self._outputs(batch, embeddings + delta)
        terms = [self._divergence(q, p) for q, p in zip(perturbed, clean, strict=True)]
        return {**sums, "sift_loss": torch.stack(terms).mean(), "sift_skipped": skipped}

    def noise(self, embeddings: Tensor) -> Tensor:
        """The first delta, like the normalised embeddings, float32 or float64 [..., features]."""
        noise = torch.randn(embeddings.shape, dtype=torch.float32, device=embeddings.device)
        limit = 2 * self.sigma
        return noise.mul_(self.sigma).clamp_(-limit, limit).to(embeddings.dtype)

    def _outputs(
        self, batch: Any, embeddings: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor]:
        """The logits of one pass, and the normalised embeddings that entered it: the model's own,
        or the given ones in their place."""
        norm = self.objective.model.backbone.embeddings.LayerNorm
        entered: list[Tensor] = []

        def enter(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            entered.append(normalized(inputs[0]) if embeddings is None else embeddings)
            return entered[0].to(norm.weight.dtype)

        hook = norm.register_forward_pre_hook(enter)
        try:
            return self.objective.outputs(batch), entered[0]
        finally:
            hook.remove()

    def _ascend(
        self, batch: Any, clean: Sequence[Tensor], embeddings: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """delta one step uphill, and 1.0 if that step was left out, else 0.0."""
        delta = delta.requires_grad_()
        perturbed, _ = self._outputs(batch, embeddings + delta)
        pairs = zip(perturbed, clean, strict=True)
        terms = [self._divergence(q, p.detach()) for q, p in pairs]
        with self._inside_forward():
            # Of delta alone: autograd then leaves the parameters' gradients uncomputed.
            (grad,) = torch.autograd.grad(torch.stack(terms).sum(), delta)
        delta = delta.detach()
        step = self.step_size * grad / (SCALE_EPS + grad.abs().amax(-1, keepdim=True))
        finite = grad.norm().isfinite()  # Not read: that would wait for the device.
        return torch.where(finite, delta + step, delta), 1.0 - finite.float()

    @contextmanager
    def _inside_forward(self) -> Iterator[None]:
        """Around a backward pass within `forward`: FSDP would take its end for the step's, and
        shard the parameters that are still in use here."""
        sharded = _sharded(self)
        if sharded:
            self.set_reshard_after_backward(False, recurse=False)  # type: ignore[operator]
            self.set_is_last_backward(False)  # type: ignore[operator]
        try:
            yield
        finally:
            if sharded:
                self.set_reshard_after_backward(True, recurse=False)  # type: ignore[operator]
                self.set_is_last_backward(True)  # type: ignore[operator]

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        """Their divergences' sum over all rows."""
        logits, target = wide(logits), wide(target)
        model: Model = self.objective.model
        config = model.config
        several = config.problem_type == "multi_label_classification"
        if model.head_name == "sequence" and config.num_labels == 1 and not several:
            return (logits - target).square().sum()
        if several or model.head_name == "entity" or logits.dim() == 1:
            # The two classes of a yes/no logit x have the logits x and 0.
            logits, target = (pad(x.unsqueeze(-1), (0, 1)) for x in (logits, target))
        log_q, log_p = log_softmax(logits, -1), log_softmax(target, -1)
        return _kl(log_p.detach(), log_q) + _kl(log_q.detach(), log_p)


def normalized(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension, in float32 at least."""
    x = wide(x)
    return layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q), the sum over all rows."""
    return (log_p.exp() * (log_p - log_q)).sum()
