"""Losses over a vocabulary whose logits never stand in memory as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Logits held at a time, in numbers: 64 MiB of float32, 128 rows of a 128k-token vocabulary.
MAX_LOGITS = 1 << 24

Reader = Callable[[Tensor, slice], Tensor]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    read: Reader | None = None,
    max_logits: int = MAX_LOGITS,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of x @ weight.T + bias, row by row, in chunks of at most max_logits logits.

    Logits that fit into one chunk are kept for the backward pass; otherwise it makes each chunk
    again. The products run in autocast's dtype where it is on, everything else in float32 (float64
    of float64 inputs).

    Args:
        x: [N, size]. weight: [vocab, size]. bias: [vocab]. targets: int64 [N].
        read: called with each chunk's logits, float32 [n, vocab], and which rows they are, without
            gradients; must not change them. Returns [n, ...]: draws, guesses.
        max_logits: at least one row is made at a time.

    Returns:
        The losses, float32 [N], and what `read` returned, [N, ...], or None.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, bias, targets, read, max_logits)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        read: Reader | None,
        max_logits: int,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.rows = max(1, max_logits // weight.size(0))
        dtype = accumulator(x.dtype)
        lse = x.new_empty(len(x), dtype=dtype)
        losses, found, kept = torch.empty_like(lse), [], None
        for rows in _chunks(len(x), ctx.rows):
            logits = _logits(x[rows], weight, bias)
            lse[rows] = logits.logsumexp(-1)
            losses[rows] = lse[rows] - logits.gather(1, targets[rows, None]).squeeze(1)
            if read is not None:
                found.append(read(logits, rows))
            if len(x) <= ctx.rows and any(ctx.needs_input_grad):
                kept = logits
        ctx.save_for_backward(x, weight, bias, targets, lse, kept)
        result = None
        if read is not None:
            result = torch.cat(found) if found else targets.new_empty(0)
            ctx.mark_non_differentiable(result)
        return losses, result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, lse, kept = ctx.saved_tensors
        grad = grads[0]
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if for_x else None
        dtype = accumulator(x.dtype)
        dweight = torch.zeros_like(weight, dtype=dtype) if for_weight else None
        dbias = torch.zeros_like(bias, dtype=dtype) if for_bias else None
        for rows in _chunks(len(x), ctx.rows):
            logits = _logits(x[rows], weight, bias) if kept is None else kept
            # softmax - one-hot, each row times its gradient
            probs = logits.sub(lse[rows, None]).exp_()
            index = targets[rows, None]
            probs.scatter_add_(1, index, -torch.ones_like(index, dtype=dtype))
            probs.mul_(grad[rows, None])
            if dbias is not None:
                dbias += probs.sum(0)
            probs = probs.to(x.dtype)
            if dx is not None:
                dx[rows] = probs @ weight
            if dweight is not None:
                if dtype == x.dtype:
                    dweight.addmm_(probs.T, x[rows])
                else:
                    dweight += probs.T @ x[rows]
        return dx, dweight, None if dbias is None else dbias.to(bias.dtype), None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = accumulator(x.dtype)
    return nn.functional.linear(x, weight).to(dtype).add_(bias)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What losses are computed in: float32 for half precision, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _chunks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def copy_cross_entropy(token_loss: Tensor, gate: Tensor, copied: Tensor) -> Tensor:
    """-log p of the original token, where p(v) = D 1[input = v] + (1 - D) softmax(v).

    Args:
        token_loss: float32 [N], -log softmax of the original token.
        gate: [N], D = sigmoid(gate). copied: bool [N], where the input is the original token.

    Source: ELECTRA, section 3.4 (All-Tokens MLM).
    """
    gate = gate.to(accumulator(gate.dtype))
    predicted = nn.functional.logsigmoid(-gate) - token_loss
    both = torch.logaddexp(nn.functional.logsigmoid(gate), predicted)
    return -torch.where(copied, both, predicted)
