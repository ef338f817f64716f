"""What every kernel asks of its tile: where it lies, which tiles are near it, what dropout keeps.

Scores are cut into BLOCK x BLOCK tiles (queries x keys). A tile whose distances i - j all lie
beyond the same saturation distance is far: one table row serves it. The others are near.
"""

import triton
import triton.language as tl

# Integers that change from call to call, or within one: no kernel is compiled anew for them.
SIZES = (
    *("tokens", "batch", "heads", "max_seqlen", "first", "last", "reach", "threshold"),
    *("group", "group_size", "tile0", "tiles", "slots", "key_tiles", "row_blocks"),
    *("ends", "margin", "table_rows"),
)


@triton.jit(do_not_specialize=SIZES)
def spans_kernel(key_mask, cu_seqlens, spans, max_seqlen, BLOCK: tl.constexpr):
    """One program: one sequence. spans: int32 [sequences, 2]: the length up to the last token to
    attend to, and whether any token before it is masked."""
    b = tl.program_id(0)
    start, length = bounds(b, cu_seqlens, max_seqlen)
    reached = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for j0 in range(0, length, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        attend = tl.load(key_mask + start + j, mask=j < length, other=0).to(tl.int32)
        reached = tl.maximum(reached, attend * (j + 1))
        count += attend
    reached = tl.max(reached, 0)
    tl.store(spans + 2 * b, reached)
    tl.store(spans + 2 * b + 1, (tl.sum(count, 0) != reached).to(tl.int32))


@triton.jit
def bounds(b, cu_seqlens, max_seqlen):
    """First token (int64) and length of sequence b."""
    if cu_seqlens is None:
        return tl.full((), b, tl.int64) * max_seqlen, max_seqlen
    else:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        return start, (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)


@triton.jit
def sequence(b, cu_seqlens, spans, max_seqlen):
    """First token (int64) of sequence b, its length without and with the padding on its right, and
    how many of its tokens may be read without a mask."""
    start, padded = bounds(b, cu_seqlens, max_seqlen)
    if spans is None:
        return start, padded, padded, padded
    else:
        length = tl.load(spans + 2 * b)
        return start, length, padded, tl.where(tl.load(spans + 2 * b + 1) != 0, 0, length)


@triton.jit
def low_key(tile, last, BLOCK: tl.constexpr):
    """First key tile near a tile of queries: left of it, distances are at least `last`."""
    return tl.maximum(tile * BLOCK - last + 1, 0) // BLOCK


@triton.jit
def near_keys(tile, length, first, last, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Key tiles [low, high) that are near a tile of queries, and the end of those it attends to;
    none for a tile of padding."""
    end = tl.where(tile * BLOCK < length, tl.cdiv(length, BLOCK), 0)
    if CAUSAL:
        end = tl.minimum(end, tile + 1)
    low = tl.minimum(low_key(tile, last, BLOCK), end)
    high = (tile * BLOCK + 2 * BLOCK - 2 - first) // BLOCK
    return low, tl.maximum(tl.minimum(high, end), low), end


@triton.jit
def low_query(tile, first, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """First query tile near a tile of keys: above it, distances are at most `first`."""
    if CAUSAL:
        return tile
    else:
        return tl.maximum(tile * BLOCK + 1 + first, 0) // BLOCK


@triton.jit
def near_queries(tile, length, first, last, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Query tiles [low, high) that are near a tile of keys, and the end of all query tiles; none
    for a tile of padding."""
    end = tl.where(tile * BLOCK < length, tl.cdiv(length, BLOCK), 0)
    low = tl.minimum(low_query(tile, first, BLOCK, CAUSAL), end)
    high = (tile * BLOCK + BLOCK - 2 + last) // BLOCK + 1
    return low, tl.maximum(tl.minimum(high, end), low), end


@triton.jit
def load_rows(
    x,
    row0,
    stride,
    end,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK, D]: rows from row0 on, zero from row `end` on; end None: all of them exist."""
    n = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, D)[None, :]
    x += tl.full((), row0, tl.int64) * stride
    inside = d < HEAD_DIM
    if end is not None:
        inside &= row0 + n < end
    elif HEAD_DIM == D:
        return tl.load(x + n * stride + d)
    return tl.load(x + n * stride + d, mask=inside, other=0.0)


@triton.jit
def store_rows(
    x,
    rows,
    token,
    head,
    heads,
    count,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the first `count` of rows [BLOCK, D] from a token on. x: [T, H, HEAD_DIM], dense."""
    n = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, D)[None, :]
    x += token * heads * HEAD_DIM + head * HEAD_DIM
    inside = (n < count) & (d < HEAD_DIM)
    tl.store(x + n * (heads * HEAD_DIM) + d, rows.to(x.dtype.element_ty), mask=inside)


@triton.jit
def far_row(expanded, head, heads, reach, side, table: tl.constexpr, D: tl.constexpr):
    """float32 [1, D]: the row of a head's table (0: c2p, 1: p2c) that serves the far tiles of a
    side: key tiles left of the near ones (0) or right of them (1)."""
    # Distances ascend in the table of p2c and descend in that of c2p.
    t = tl.where(side == table, 0, 2 * reach - 1)
    place = expanded + ((table * heads + head).to(tl.int64) * 2 * reach + t) * D
    return tl.load(place + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def far_shift(
    q,
    expanded,
    head,
    heads,
    reach,
    scale,
    side,
    D: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
):
    """Queries and row constants that make the scores of far tiles plain products.

    There r is constant: q_i . k_j + q_i . pos_key[r] + k_j . pos_query[r]
    = (q_i + pos_query[r]) . k_j + shift_i.
    """
    shift = tl.zeros([q.shape[0]], tl.float32)
    if C2P:
        row = far_row(expanded, head, heads, reach, side, 0, D)
        shift = tl.sum(q.to(tl.float32) * row, 1) * scale
    if P2C:
        row = far_row(expanded, head, heads, reach, side, 1, D)
        q = (q.to(tl.float32) + row).to(q.dtype)
    return q, shift


@triton.jit
def attended(
    i0,
    j0,
    length,
    start,
    key_mask,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """bool [ROWS, COLUMNS]: which keys from j0 on the queries from i0 on may attend to."""
    j = j0 + tl.arange(0, COLUMNS)
    attend = (j < length)[None, :]
    if key_mask is not None:
        attend &= tl.load(key_mask + start + j, mask=j < length, other=0).to(tl.int1)[None, :]
    if CAUSAL:
        attend &= (i0 + tl.arange(0, ROWS))[:, None] >= j[None, :]
    return attend


@triton.jit
def keep_tile(rng_state, stream, i0, j0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: what dropout keeps of the scores from (i0, j0) on, which are multiples
    of 16; stream: sequence * heads + head. See fastdeberta.dropout.

    One draw of four words serves rows i, i + 8 and columns j, j + 1.
    """
    seed = tl.load(rng_state)
    offset = tl.load(rng_state + 1).to(tl.uint32)
    row = (i0 // 2 + tl.arange(0, ROWS // 2)).to(tl.uint32)[:, None]
    column = (j0 // 2 + tl.arange(0, COLUMNS // 2)).to(tl.uint32)[None, :]
    zero = row * 0 + column * 0
    w0, w1, w2, w3 = tl.philox(
        seed, zero + column, zero + row, zero + stream.to(tl.uint32), zero + offset
    )
    limit = threshold.to(tl.uint32)
    upper = tl.join((w0 >= limit).to(tl.int8), (w1 >= limit).to(tl.int8))
    lower = tl.join((w2 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    upper = upper.reshape(ROWS // 16, 8, COLUMNS)
    lower = lower.reshape(ROWS // 16, 8, COLUMNS)
    keep = tl.join(upper, lower).permute(0, 3, 1, 2)  # [16-row blocks, half, 8, COLUMNS]
    return keep.reshape(ROWS, COLUMNS) != 0
