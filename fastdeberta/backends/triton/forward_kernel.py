"""The forward pass: online softmax over the key tiles of one tile of queries."""

import triton
import triton.language as tl

from .bands import position_scores
from .tiles import SIZES, attended, far_shift, keep_tile, load_rows, near_keys, sequence, store_rows


@triton.jit
def _attend(
    row_max,
    row_sum,
    acc,
    q,
    shift,
    key,
    value,
    stride_kt,
    stride_vt,
    key_mask,
    start,
    length,
    tile_i,
    j_low,
    j_high,
    workspace,
    dropout,
    scale,
    NEAR: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Online softmax over the keys from j_low to j_high, whole tiles, all near or all far.

    shift: added to every score of a row, in units of log2. Row sums are of all probabilities, also
    of those that dropout drops.
    """
    rng_state, stream, threshold = dropout
    i0 = tile_i * BLOCK
    end = length if MASKED else None
    # Masked tiles are few: what their loop would keep in registers is needed by the other.
    for j0 in tl.range(j_low, j_high, BLOCK, num_stages=STAGES, disable_licm=MASKED):
        k = load_rows(key, j0, stride_kt, end, HEAD_DIM, D, BLOCK)
        v = load_rows(value, j0, stride_vt, end, HEAD_DIM, D, BLOCK)
        if NEAR:
            scores = position_scores(workspace, tile_i, j0, BLOCK, BLOCK, C2P, P2C, CAUSAL)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            attend = attended(i0, j0, length, start, key_mask, BLOCK, BLOCK, CAUSAL)
            scores = tl.where(attend, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale + shift)
        probs = tl.math.exp2(scores * scale - (new_max - shift)[:, None])
        alpha = tl.math.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * alpha + tl.sum(probs, 1)
        if rng_state is not None:
            keep = keep_tile(rng_state, stream, i0, j0, threshold, BLOCK, BLOCK)
            probs = tl.where(keep, probs, 0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return row_max, row_sum, acc


@triton.jit
def _average(
    value,
    stride_vt,
    i0,
    padded,
    dropout,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 [BLOCK, D]: the sum of a sequence's values that dropout keeps, over its length."""
    rng_state, stream, threshold = dropout
    acc = tl.zeros([BLOCK, D], tl.float32)
    for j0 in range(0, padded, BLOCK):
        v = load_rows(value, j0, stride_vt, padded, HEAD_DIM, D, BLOCK)
        probs = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
        if rng_state is not None:
            keep = keep_tile(rng_state, stream, i0, j0, threshold, BLOCK, BLOCK)
            probs = tl.where(keep, probs, 0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc / padded


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query,
    key,
    value,
    expanded,
    bands,
    out,
    lse,
    cu_seqlens,
    spans,
    key_mask,
    rng_state,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_side,
    tokens,
    batch,
    heads,
    max_seqlen,
    first,
    last,
    reach,
    group,
    tile0,
    tiles,
    slots,
    key_tiles,
    scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    HAS_FAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BLOCK queries of one head, against every key of their sequence.

    score(i, j) = q_i . k_j + q_i . pos_key[r] + k_j . pos_query[r],  r = row(i - j)

    scale: of the scores, times log2(e). UNIFORM: masked queries average all values.
    """
    pid = tl.program_id(0)
    g = pid // tiles
    tile_i = pid % tiles + tile0
    head, b = (group + g) // batch, (group + g) % batch
    start, length, padded, plain = sequence(b, cu_seqlens, spans, max_seqlen)
    i0 = tile_i * BLOCK
    if i0 >= padded:
        return
    i = i0 + tl.arange(0, BLOCK)
    query += start * stride_qt + head.to(tl.int64) * stride_qh
    key += start * stride_kt + head.to(tl.int64) * stride_kh
    value += start * stride_vt + head.to(tl.int64) * stride_vh
    q = load_rows(query, i0, stride_qt, length, HEAD_DIM, D, BLOCK)
    dropout = (rng_state, b * heads + head, threshold)
    workspace = (bands, g, stride_side, tile0, tiles, slots, key_tiles, first, last)

    HAS_NEAR: tl.constexpr = C2P or P2C
    low, high, end = near_keys(tile_i, length, first, last, BLOCK, CAUSAL)
    if not HAS_NEAR:
        low = end
        high = end
    plain = plain // BLOCK  # Tiles that need no mask.
    if CAUSAL:
        plain = tl.minimum(plain, tile_i)

    row_max = tl.full([BLOCK], -1.0e30, tl.float32)  # Finite: what is masked is -inf.
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for kind in tl.static_range(3):  # Far tiles left of the near ones, far tiles right, near tiles.
        if (HAS_FAR and (kind == 0 or (kind == 1 and HAS_NEAR))) or (kind == 2 and HAS_NEAR):
            tile_low = low if kind == 2 else (high if kind == 1 else 0)
            tile_high = high if kind == 2 else (end if kind == 1 else low)
            shifted, shift = q, tl.zeros([BLOCK], tl.float32)
            if kind < 2:
                shifted, shift = far_shift(
                    q, expanded, head, heads, reach, scale, kind, D, C2P, P2C
                )
            for masked in tl.static_range(2):
                row_max, row_sum, acc = _attend(
                    row_max,
                    row_sum,
                    acc,
                    shifted,
                    shift,
                    key,
                    value,
                    stride_kt,
                    stride_vt,
                    key_mask,
                    start,
                    length,
                    tile_i,
                    (tl.maximum(tile_low, plain) if masked else tile_low) * BLOCK,
                    (tile_high if masked else tl.minimum(tile_high, plain)) * BLOCK,
                    workspace,
                    dropout,
                    scale,
                    kind == 2,
                    masked == 1,
                    HEAD_DIM,
                    D,
                    BLOCK,
                    C2P,
                    P2C,
                    CAUSAL,
                    PRECISION,
                    STAGES,
                )

    # Rows without a key, and rows of masked tokens, are zero.
    valid = row_sum > 0.0
    if key_mask is not None:
        valid &= tl.load(key_mask + start + i, mask=i < padded, other=0).to(tl.int1)
    row_sum = tl.where(valid, row_sum, 1.0)
    result = acc * tl.where(valid, keep_scale / row_sum, 0.0)[:, None]
    if UNIFORM:
        if tl.min(valid.to(tl.int32), 0) == 0:
            average = _average(value, stride_vt, i0, padded, dropout, HEAD_DIM, D, BLOCK, PRECISION)
            result = tl.where(valid[:, None], result, average * keep_scale)
    log_sum = (row_max + tl.math.log2(row_sum)) * 0.6931471805599453
    log_sum = tl.where(valid, log_sum, -float("inf"))
    tl.store(lse + head.to(tl.int64) * tokens + start + i, log_sum, mask=i < padded)
    store_rows(out, result, start + i0, head, heads, padded - i0, HEAD_DIM, D, BLOCK)
