"""The backward pass of attention, from the saved log-sum-exp.

dq_kernel owns a tile of queries and makes every probability again. Near its tile, it leaves the
gradients of scores and the probabilities in the workspace, in place of the position scores that it
has read; near_dkv_kernel then has plain products to do. dkv_kernel owns a tile of keys, does the
far tiles, whose probabilities nobody keeps, and completes dkey and dvalue.
"""

import triton
import triton.language as tl

from .bands import c2p_tile, p2c_tile, position_scores
from .tiles import (
    SIZES,
    attended,
    far_row,
    far_shift,
    keep_tile,
    load_rows,
    low_key,
    near_keys,
    near_queries,
    sequence,
    store_rows,
)


@triton.jit
def _dq_tiles(
    dq,
    row_sum,
    q,
    shift,
    do,
    delta,
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
    STEP: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq of the keys from j_low to j_high, all near or all far, and the row sums of their dscores.

    shift: of a row's scores, less its log-sum-exp, in units of log2. dscores are not yet scaled.
    """
    rng_state, stream, threshold, keep_scale = dropout
    i0 = tile_i * BLOCK
    end = length if MASKED else None
    for j0 in tl.range(j_low, j_high, STEP, num_stages=STAGES, disable_licm=MASKED):
        k = load_rows(key, j0, stride_kt, end, HEAD_DIM, D, STEP)
        v = load_rows(value, j0, stride_vt, end, HEAD_DIM, D, STEP)
        if NEAR:
            scores = position_scores(workspace, tile_i, j0, BLOCK, STEP, C2P, P2C, CAUSAL)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        probs = tl.math.exp2(scores * scale + shift[:, None])
        if MASKED:
            attend = attended(i0, j0, length, start, key_mask, BLOCK, STEP, CAUSAL)
            probs = tl.where(attend, probs, 0.0)
        used = probs
        if rng_state is not None:
            keep = keep_tile(rng_state, stream, i0, j0, threshold, BLOCK, STEP)
            used = tl.where(keep, probs * keep_scale, 0.0)
        if NEAR:
            place = p2c_tile(workspace, tile_i, j0, BLOCK, STEP, CAUSAL)
            tl.store(place, tl.trans(used.to(q.dtype)))
        dprobs = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if rng_state is not None:
            dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
        dscores = probs * (dprobs - delta[:, None])
        if NEAR:
            tl.store(c2p_tile(workspace, tile_i, j0, BLOCK, STEP), dscores.to(q.dtype))
        else:
            row_sum += tl.sum(dscores, 1)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    query,
    key,
    value,
    dout,
    out,
    lse,
    expanded,
    bands,
    dquery,
    offsets,
    deltas,
    query_ends,
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
    stride_dt,
    stride_dh,
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
    ends,
    scale,
    softmax_scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    HAS_FAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BLOCK queries of one head. Without c2p their gradient is complete here.

    For dkv_kernel: offsets, float32 [2, H, T], what far tiles on either side add to a score, less
    the log-sum-exp, in units of log2; deltas, float32 [H, T]. query_ends: float32
    [2, H, ends, D], this tile's part of the gradients of the two far rows of pos_key.
    """
    pid = tl.program_id(0)
    g = pid // tiles
    tile_i = pid % tiles + tile0
    head, b = (group + g) // batch, (group + g) % batch
    start, length, padded, plain = sequence(b, cu_seqlens, spans, max_seqlen)
    i0 = tile_i * BLOCK
    HAS_NEAR: tl.constexpr = C2P or P2C
    d = tl.arange(0, D)
    if i0 >= padded:
        if HAS_FAR and C2P:
            for side in tl.static_range(2):
                end = ((side * heads + head) * ends + b * (ends // batch) + tile_i).to(tl.int64)
                tl.store(query_ends + end * D + d, tl.zeros([D], tl.float32))
        return
    i = i0 + tl.arange(0, BLOCK)
    query += start * stride_qt + head.to(tl.int64) * stride_qh
    key += start * stride_kt + head.to(tl.int64) * stride_kh
    value += start * stride_vt + head.to(tl.int64) * stride_vh
    dout += start * stride_dt + head.to(tl.int64) * stride_dh
    out += start * heads * HEAD_DIM + head * HEAD_DIM
    row = head.to(tl.int64) * tokens + start + i
    q = load_rows(query, i0, stride_qt, length, HEAD_DIM, D, BLOCK)
    do = load_rows(dout, i0, stride_dt, length, HEAD_DIM, D, BLOCK)
    o = load_rows(out, i0, heads * HEAD_DIM, length, HEAD_DIM, D, BLOCK)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    log_sum = tl.load(lse + row, mask=i < padded, other=-float("inf")) * 1.4426950408889634
    # Rows without a key have no probabilities: exp2(-inf) each.
    minus_log_sum = tl.where(log_sum == -float("inf"), -float("inf"), -log_sum)
    dropout = (rng_state, b * heads + head, threshold, keep_scale)
    workspace = (bands, g, stride_side, tile0, tiles, slots, key_tiles, first, last)

    low, high, end = near_keys(tile_i, length, first, last, BLOCK, CAUSAL)
    if not HAS_NEAR:
        low = end
        high = end
    plain = plain // BLOCK
    if CAUSAL:
        plain = tl.minimum(plain, tile_i)

    dq = tl.zeros([BLOCK, D], tl.float32)
    if HAS_FAR:
        tl.store(deltas + row, delta, mask=i < padded)
    for kind in tl.static_range(3):  # Far tiles left of the near ones, far tiles right, near tiles.
        if (HAS_FAR and (kind == 0 or (kind == 1 and HAS_NEAR))) or (kind == 2 and HAS_NEAR):
            tile_low = low if kind == 2 else (high if kind == 1 else 0)
            tile_high = high if kind == 2 else (end if kind == 1 else low)
            shifted, shift = q, minus_log_sum
            if kind < 2:
                shifted, shift = far_shift(
                    q, expanded, head, heads, reach, scale, kind, D, C2P, P2C
                )
                shift += minus_log_sum
                tl.store(offsets + kind * heads.to(tl.int64) * tokens + row, shift, mask=i < padded)
            row_sum = tl.zeros([BLOCK], tl.float32)
            for masked in tl.static_range(2):
                dq, row_sum = _dq_tiles(
                    dq,
                    row_sum,
                    shifted,
                    shift,
                    do,
                    delta,
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
                    STEP,
                    C2P,
                    P2C,
                    CAUSAL,
                    PRECISION,
                    STAGES,
                )
            if kind < 2 and C2P:
                dq += row_sum[:, None] * far_row(expanded, head, heads, reach, kind, 0, D)
                slot = ((kind * heads + head) * ends + b * (ends // batch) + tile_i).to(tl.int64)
                part = tl.sum(row_sum[:, None] * q.to(tl.float32), 0)
                tl.store(query_ends + slot * D + d, part)
    if not C2P:
        dq *= softmax_scale
    store_rows(dquery, dq, start + i0, head, heads, padded - i0, HEAD_DIM, D, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def near_dkv_kernel(
    query,
    dout,
    bands,
    dkey,
    dvalue,
    cu_seqlens,
    spans,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    stride_side,
    batch,
    heads,
    max_seqlen,
    first,
    last,
    group,
    tile0,
    tiles,
    slots,
    key_tiles,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    P2C: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BLOCK keys of one head, against the group's queries near them.

    Reads dscores (side 0) and probabilities (side 1) from the workspace and puts dscores in the
    place of the latter, for p2c. ACCUMULATE: dkey and dvalue are float32 sums, to which groups of
    query tiles add one after another. Otherwise dvalue is complete, and dkey too without p2c.
    """
    pid = tl.program_id(0)
    g = pid // key_tiles
    tile_j = pid % key_tiles + low_key(tile0, last, BLOCK)
    head, b = (group + g) // batch, (group + g) % batch
    start, length, padded, _ = sequence(b, cu_seqlens, spans, max_seqlen)
    j0 = tile_j * BLOCK
    low, high, _ = near_queries(tile_j, length, first, last, BLOCK, CAUSAL)
    begun = low < tile0
    low = tl.maximum(low, tile0)
    high = tl.minimum(high, tile0 + tiles)
    if ACCUMULATE:
        if (j0 >= length) | (low >= high):
            return
    if j0 >= padded:
        return
    query += start * stride_qt + head.to(tl.int64) * stride_qh
    dout += start * stride_dt + head.to(tl.int64) * stride_dh
    workspace = (bands, g, stride_side, tile0, tiles, slots, key_tiles, first, last)

    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    if ACCUMULATE:
        if begun:
            n = tl.arange(0, BLOCK)[:, None]
            d = tl.arange(0, D)[None, :]
            place = (start + j0) * heads * HEAD_DIM + head * HEAD_DIM + n * (heads * HEAD_DIM) + d
            inside = (j0 + n < padded) & (d < HEAD_DIM)
            dk = tl.load(dkey + place, mask=inside, other=0.0)
            dv = tl.load(dvalue + place, mask=inside, other=0.0)
    for tile_i in tl.range(low, high, num_stages=STAGES):
        q = load_rows(query, tile_i * BLOCK, stride_qt, length, HEAD_DIM, D, BLOCK)
        do = load_rows(dout, tile_i * BLOCK, stride_dt, length, HEAD_DIM, D, BLOCK)
        place = p2c_tile(workspace, tile_i, j0, BLOCK, BLOCK, CAUSAL)
        probs = tl.load(place)  # [j, i]
        dscores = tl.trans(tl.load(c2p_tile(workspace, tile_i, j0, BLOCK, BLOCK)))
        dv = tl.dot(probs, do, dv, input_precision=PRECISION)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
        if P2C:
            tl.store(place, dscores)
    if not ACCUMULATE and not P2C:
        dk *= softmax_scale
    store_rows(dkey, dk, start + j0, head, heads, padded - j0, HEAD_DIM, D, BLOCK)
    store_rows(dvalue, dv, start + j0, head, heads, padded - j0, HEAD_DIM, D, BLOCK)


@triton.jit
def _dkv_tiles(
    dk,
    dv,
    column_sum,
    k,
    v,
    weight,
    query,
    dout,
    offsets,
    deltas,
    stride_qt,
    stride_dt,
    length,
    j0,
    i_low,
    i_high,
    dropout,
    scale,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk, dv of far queries from i_low to i_high, and the sums of keys' dscores.

    weight: what keys add to scores, offsets: what queries do, both in units of log2.
    """
    rng_state, stream, threshold, keep_scale = dropout
    end = length if MASKED else None
    for i0 in tl.range(i_low, i_high, STEP, num_stages=STAGES, disable_licm=MASKED):
        i = i0 + tl.arange(0, STEP)
        q = load_rows(query, i0, stride_qt, end, HEAD_DIM, D, STEP)
        do = load_rows(dout, i0, stride_dt, end, HEAD_DIM, D, STEP)
        if MASKED:
            offset = tl.load(offsets + i, mask=i < length, other=-float("inf"))
            delta = tl.load(deltas + i, mask=i < length, other=0.0)
        else:
            offset = tl.load(offsets + i)
            delta = tl.load(deltas + i)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [j, i]
        probs = tl.math.exp2((scores * scale + weight[:, None]) + offset[None, :])
        if CAUSAL:
            probs = tl.where(i[None, :] >= (j0 + tl.arange(0, BLOCK))[:, None], probs, 0.0)
        used = probs
        if rng_state is not None:
            keep = tl.trans(keep_tile(rng_state, stream, i0, j0, threshold, STEP, BLOCK))
            used = tl.where(keep, probs * keep_scale, 0.0)
        dv = tl.dot(used.to(do.dtype), do, dv, input_precision=PRECISION)
        dprobs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if rng_state is not None:
            dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
        dscores = probs * (dprobs - delta[None, :])
        column_sum += tl.sum(dscores, 1)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, column_sum


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    query,
    key,
    value,
    dout,
    expanded,
    offsets,
    deltas,
    dkey_sum,
    dvalue_sum,
    dkey,
    dvalue,
    key_ends,
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
    stride_dt,
    stride_dh,
    tokens,
    batch,
    heads,
    max_seqlen,
    first,
    last,
    reach,
    tiles,
    ends,
    scale,
    softmax_scale,
    threshold,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    HAS_FAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BLOCK keys of one head, against the queries far from them; and the end of dkey
    and dvalue, to which dkey_sum and dvalue_sum (float32) bring what near queries gave.

    offsets, deltas: of dq_kernel. key_ends: like its query_ends, of pos_query.
    """
    pid = tl.program_id(0)
    tile_j = pid % tiles
    head, b = pid // tiles // batch, pid // tiles % batch
    start, length, padded, _ = sequence(b, cu_seqlens, spans, max_seqlen)
    j0 = tile_j * BLOCK
    HAS_NEAR: tl.constexpr = C2P or P2C
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    j = j0 + n
    if HAS_FAR and P2C:
        if j0 >= length:
            for side in tl.static_range(2):
                end = ((side * heads + head) * ends + b * (ends // batch) + tile_j).to(tl.int64)
                tl.store(key_ends + end * D + d, tl.zeros([D], tl.float32))
    if j0 >= padded:
        return
    head_rows = head.to(tl.int64) * tokens + start
    query += start * stride_qt + head.to(tl.int64) * stride_qh
    key += start * stride_kt + head.to(tl.int64) * stride_kh
    value += start * stride_vt + head.to(tl.int64) * stride_vh
    dout += start * stride_dt + head.to(tl.int64) * stride_dh
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    if HAS_FAR:
        k = load_rows(key, j0, stride_kt, length, HEAD_DIM, D, BLOCK)
        v = load_rows(value, j0, stride_vt, length, HEAD_DIM, D, BLOCK)
        real = j < length
        if key_mask is not None:
            real &= tl.load(key_mask + start + j, mask=real, other=0).to(tl.int1)
        low, high, end = near_queries(tile_j, length, first, last, BLOCK, CAUSAL)
        if not HAS_NEAR:
            high = tl.minimum(tile_j, end) if CAUSAL else 0
        if CAUSAL or not HAS_NEAR:
            low = 0  # No query sees a key to the right of its near tiles.
        for side in range(2 if HAS_NEAR else 1):
            # Keys left of a query's near tiles have their queries below, and the reverse.
            tile_low = tl.where(side == 0, high, 0)
            tile_high = tl.where(side == 0, end, low)
            weight = tl.zeros([BLOCK], tl.float32)
            if P2C:
                row = far_row(expanded, head, heads, reach, side, 1, D)
                weight = tl.sum(k.to(tl.float32) * row, 1) * scale
            weight = tl.where(real, weight, -float("inf"))
            column_sum = tl.zeros([BLOCK], tl.float32)
            plain = tl.maximum(tl.minimum(tile_high, length // BLOCK), tile_low) * BLOCK
            for masked in tl.static_range(2):
                dk, dv, column_sum = _dkv_tiles(
                    dk,
                    dv,
                    column_sum,
                    k,
                    v,
                    weight,
                    query,
                    dout,
                    offsets + side * heads.to(tl.int64) * tokens + head_rows,
                    deltas + head_rows,
                    stride_qt,
                    stride_dt,
                    length,
                    j0,
                    plain if masked else tile_low * BLOCK,
                    tile_high * BLOCK if masked else plain,
                    (rng_state, b * heads + head, threshold, keep_scale),
                    scale,
                    masked == 1,
                    HEAD_DIM,
                    D,
                    BLOCK,
                    STEP,
                    CAUSAL and not HAS_NEAR,
                    PRECISION,
                    STAGES,
                )
            if P2C:
                dk += column_sum[:, None] * far_row(expanded, head, heads, reach, side, 1, D)
                slot = ((side * heads + head) * ends + b * (ends // batch) + tile_j).to(tl.int64)
                part = tl.sum(column_sum[:, None] * k.to(tl.float32), 0)
                tl.store(key_ends + slot * D + d, part)
    if UNIFORM:
        average = tl.zeros([BLOCK, D], tl.float32)
        for i0 in range(0, padded, STEP):
            i = i0 + tl.arange(0, STEP)
            attend = tl.load(key_mask + start + i, mask=i < padded, other=1).to(tl.int1)
            if tl.min(attend.to(tl.int32), 0) == 0:
                do = load_rows(dout, i0, stride_dt, padded, HEAD_DIM, D, STEP)
                probs = tl.zeros([BLOCK, STEP], tl.float32)
                probs = tl.where(attend[None, :], probs, 1.0)
                if rng_state is not None:
                    keep = keep_tile(rng_state, b * heads + head, i0, j0, threshold, STEP, BLOCK)
                    probs *= tl.trans(tl.where(keep, 1.0, 0.0))
                average = tl.dot(probs.to(do.dtype), do, average, input_precision=PRECISION)
        dv += average * (keep_scale / padded)
    if HAS_NEAR:
        place = (start + j0) * heads * HEAD_DIM + head * HEAD_DIM
        place += n[:, None] * (heads * HEAD_DIM) + d[None, :]
        inside = (j < length)[:, None] & (d < HEAD_DIM)[None, :]
        dk += tl.load(dkey_sum + place, mask=inside, other=0.0)
        dv += tl.load(dvalue_sum + place, mask=inside, other=0.0)
    dk *= softmax_scale
    store_rows(dkey, dk, start + j0, head, heads, padded - j0, HEAD_DIM, D, BLOCK)
    store_rows(dvalue, dv, start + j0, head, heads, padded - j0, HEAD_DIM, D, BLOCK)
