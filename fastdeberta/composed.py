"""Attention in plain differentiable PyTorch, for what the fused op leaves out."""

import torch
from torch import Tensor, nn


def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    *,
    rows: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    softmax_scale: float,
    dropout_p: float = 0.0,
    padded_rows: str = "uniform",
    mix_scores: nn.Module | None = None,
    mix_probs: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Disentangled attention that holds all scores, [B, H, Lq, Lk].

    Args:
        query: [B, Lq, H, D]. key, value: [B, Lk, H, D]. pos_key, pos_query: [R, H, D] or None.
        rows: int64 rows of the c2p and p2c terms, each broadcastable to [B, 1, Lq, Lk].
        mask: bool, broadcastable to [B, H, Lq, Lk], True = attend.
        padded_rows: what a row without any True becomes: "uniform" over its keys, as in
            transformers, or "zeros".
        mix_scores, mix_probs: linear maps over the head axis (talking heads, v1).

    Returns:
        context [B, Lq, H, D] and, after dropout, probabilities [B, H, Lq, Lk].
    """
    # Scaled before the products: float16 could not hold the sums.
    q, k, v = (x.transpose(1, 2) for x in (query * softmax_scale, key, value))
    scores = q @ k.transpose(-1, -2)
    if rows is not None:
        size = scores.shape
        if pos_key is not None:
            c2p = torch.einsum("bhid,rhd->bhir", q, pos_key)
            scores = scores + c2p.gather(-1, rows[0].expand(size))
        if pos_query is not None and query.size(1) == 1:
            # One query meets one row a key, less work than all rows against all keys.
            row = rows[1][:, 0, 0]  # [B or 1, Lk]
            met = pos_query.index_select(0, row.flatten()).mul_(softmax_scale)
            met = met.unflatten(0, row.shape).transpose(1, 2)
            scores = scores + (k * met).sum(-1).unsqueeze(2)
        elif pos_query is not None:
            p2c = (pos_query * softmax_scale).transpose(0, 1) @ k.transpose(-1, -2)  # [B, H, R, Lk]
            scores = scores + p2c.gather(-2, rows[1].expand(size))
    if mix_scores is not None:
        scores = mix_scores(scores.movedim(1, -1)).movedim(-1, 1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1)
    if mask is not None and padded_rows == "zeros":
        probs = probs.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    if dropout_p > 0:
        probs = nn.functional.dropout(probs, dropout_p)
    if mix_probs is not None:
        probs = mix_probs(probs.movedim(1, -1)).movedim(-1, 1)
    return (probs @ v).transpose(1, 2), probs
