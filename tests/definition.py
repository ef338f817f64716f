"""Disentangled attention as its papers define it, one gather a score: what backends are held to.

Shares no code with the package. Its gradients are autograd's.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def row(distance: int, span: int, buckets: int | None, max_distance: int, clip: bool) -> int:
    """DeBERTa, eq. 3, and DeBERTa-v2's logarithmic buckets, for one distance."""
    if clip:
        distance = max(-max_distance + 1, min(max_distance - 1, distance))
    bucket = distance
    if buckets is not None and abs(distance) > buckets // 2:
        mid = buckets // 2
        growth = math.log(abs(distance) / mid) / math.log((max_distance - 1) / mid)
        bucket = math.ceil(growth * (mid - 1)) + mid
        bucket = bucket if distance > 0 else -bucket
    return max(0, min(2 * span - 1, bucket + span))


@lru_cache(maxsize=32)
def rows(rule, length: int) -> Tensor:
    """[length, length]: the row of each (i, j). rule: a RelativePosition, read as plain data."""
    of_distance = [
        row(x, rule.span, rule.buckets, rule.max_distance, rule.clip_distance)
        for x in range(1 - length, length)
    ]
    position = torch.arange(length)
    return torch.tensor(of_distance)[position[:, None] - position[None, :] + length - 1]


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of uint32 counters [..., 4] (Salmon et al. 2011)."""
    words = [counter[..., n].astype(np.uint64) for n in range(4)]
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for step in range(10):
        keys = [
            np.uint64((key[0] + step * 0x9E3779B9) & 0xFFFFFFFF),
            np.uint64((key[1] + step * 0xBB67AE85) & 0xFFFFFFFF),
        ]
        a = words[0] * np.uint64(0xD2511F53)
        b = words[2] * np.uint64(0xCD9E8D57)
        words = [
            (b >> half) ^ words[1] ^ keys[0],
            b & mask,
            (a >> half) ^ words[3] ^ keys[1],
            a & mask,
        ]
    return np.stack(words, -1).astype(np.uint32)


def keep_mask(
    seed: int, offset: int, sequences: int, heads: int, length: int, dropout_p: float
) -> Tensor:
    """bool [sequences, heads, length, length]: the probabilities that dropout keeps."""
    b, h, i, j = np.meshgrid(
        *(np.arange(n) for n in (sequences, heads, length, length)), indexing="ij"
    )
    counter = np.stack(
        [j // 2, i // 16 * 8 + i % 8, b * heads + h, np.full_like(b, offset & 0xFFFFFFFF)], -1
    )
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    word = np.take_along_axis(words, (i % 16 // 8 * 2 + j % 2)[..., None], -1)[..., 0]
    return torch.from_numpy(word >= np.uint32(int(dropout_p * 2**32)))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    *,
    bounds: list[tuple[int, int]],
    rule=None,
    attend: Tensor | None = None,
    keep: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    uniform: bool = False,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T] of packed tokens [T, H, D].

    Args:
        bounds: first token and end of each sequence; they cover all T.
        rule: a RelativePosition.
        attend: bool [T]. keep: bool [B, H, L, L], None without dropout.
        uniform: masked queries average their sequence's values; otherwise they are zero.
    """
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    scale = softmax_scale or 1 / math.sqrt(query.size(-1) * terms)
    outs, lses = [query[:0]], [query[:0, :, 0].t()]
    for b, (start, end) in enumerate(bounds):
        if start == end:
            continue
        q, k, v = query[start:end], key[start:end], value[start:end]
        length, heads = end - start, query.size(1)
        scores = torch.einsum("ihd,jhd->hij", q, k)
        if pos_key is not None or pos_query is not None:
            r = rows(rule, length).to(query.device).expand(heads, -1, -1)
        if pos_key is not None:
            scores = scores + torch.einsum("ihd,rhd->hir", q, pos_key).gather(2, r)
        if pos_query is not None:
            scores = scores + torch.einsum("jhd,rhd->hrj", k, pos_query).gather(1, r)
        scores = scores * scale

        allowed = torch.ones(length, length, dtype=torch.bool, device=query.device)
        if attend is not None:
            allowed = attend[start:end, None] & attend[None, start:end]
        if causal:
            allowed = allowed.tril()
        scores = scores.masked_fill(~allowed, -math.inf)
        lses.append(scores.detach().logsumexp(-1))
        some = allowed.any(-1, keepdim=True)
        probs = scores.masked_fill(~some, 0.0).softmax(-1)
        if not uniform:
            probs = probs.masked_fill(~some, 0.0)
        if keep is not None:
            probs = probs * keep[b, :, :length, :length].to(probs) / (1 - dropout_p)
        outs.append(torch.einsum("hij,jhd->ihd", probs, v))
    return torch.cat(outs), torch.cat(lses, 1)
