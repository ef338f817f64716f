"""Bands: position scores of near tiles, shifted along diagonals so that a tile is a plain read.

c2p of query i against key j is q_i . table[j - i], so a matrix product over distances gives rows
that must each be shifted by one column more than the row above. A shift by whole octets (8 columns)
keeps every access a 16-byte vector; so one program takes rows of one residue, x = x0 + 8 a + r, and
reads the table from a row r lower: column c of its product is y = x0 + 8 a + c. p2c is the same
with the parts of queries and keys exchanged.

A workspace holds the bands of some heads and query tiles, a group. Side 0 (c2p) has queries as rows
x and keys as columns y, side 1 (p2c) keys as rows and queries as columns. The backward pass puts
gradients of the scores in their place, and takes the same way back.
"""

import triton
import triton.language as tl

from .tiles import SIZES, low_key, low_query, sequence


@triton.jit
def side_limits(
    side,
    g,
    end,
    tile0,
    tiles,
    slots,
    key_tiles,
    first,
    last,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """What near_columns needs of a side of a head's bands, and the first and last x of its rows.

    end: of the sequence's tiles. Near tiles of a tile from x on reach from y = x + low to x + high,
    in whole tiles, and lie between y_low and y_high.
    """
    if side == 0:
        x_low = tile0 * BLOCK
        rows = tiles * BLOCK
        pitch = slots * BLOCK
        low = 1 - last
        high = BLOCK if CAUSAL else 2 * BLOCK - 2 - first
        y_low = 0
        y_high = end
    else:
        x_low = low_key(tile0, last, BLOCK) * BLOCK
        rows = key_tiles * BLOCK
        pitch = tl.minimum(tiles, slots) * BLOCK
        low = 0 if CAUSAL else 1 + first
        high = 2 * BLOCK - 2 + last
        y_low = tile0 * BLOCK
        y_high = tl.minimum(end, (tile0 + tiles) * BLOCK)
    begin = g * rows * pitch
    return x_low, tl.minimum(x_low + rows, end), low, high, y_low, y_high, pitch, begin


@triton.jit
def near_columns(x, limits, BLOCK: tl.constexpr):
    """Columns y0 <= y < y1 of rows x that lie in near tiles of the group, and the place in the side
    of y = 0 of each row."""
    x_low, x_high, low, high, y_low, y_high, pitch, begin = limits
    tile = x & -BLOCK
    y0 = tl.maximum(tl.maximum(tile + low, 0) & -BLOCK, y_low)
    y1 = tl.where(x < x_high, tl.minimum((tile + high) & -BLOCK, y_high), 0)
    return y0, tl.maximum(y1, y0), begin + (x - x_low) * pitch - y0


@triton.jit
def octets(x, c0, residue, limits, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Places [rows, COLUMNS] in a side of the columns from c0 on, and which of them are near."""
    y0, y1, place = near_columns(x, limits, BLOCK)
    c = tl.arange(0, COLUMNS)[None, :]
    # Octets are whole: all that is added to c is a multiple of 8.
    y = tl.multiple_of(x - residue + c0, 8)
    near = tl.multiple_of(y - y0, 8)[:, None] + c // 8 * 8
    place = tl.multiple_of(place + y, 8)[:, None] + c
    return place, near.to(tl.uint32) < (y1 - y0).to(tl.uint32)[:, None]


@triton.jit
def column_range(x0, end, limits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The range of c, in whole octets, in which the rows from x0 on meet near tiles."""
    _, _, low, high, y_low, y_high, _, _ = limits
    low = tl.maximum(low - 2 * BLOCK, y_low - x0 - 8 * (ROWS - 1))
    return (low >> 3) * 8, tl.minimum(high + 8, y_high - x0)


@triton.jit
def c2p_tile(workspace, tile_i, j0, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Pointers [BLOCK, STEP] into side 0: the queries of a tile, near keys from j0 on."""
    bands, g, _, tile0, tiles, slots, _, _, last = workspace
    pitch = slots * BLOCK
    row = (g * tiles + tile_i - tile0) * BLOCK
    column = j0 - low_key(tile_i, last, BLOCK) * BLOCK
    m = tl.arange(0, BLOCK)[:, None]
    return bands + (row * pitch + column) + m * pitch + tl.arange(0, STEP)[None, :]


@triton.jit
def p2c_tile(workspace, tile_i, j0, BLOCK: tl.constexpr, STEP: tl.constexpr, CAUSAL: tl.constexpr):
    """Pointers [STEP, BLOCK] into side 1: near keys from j0 on, the queries of a tile."""
    bands, g, stride_side, tile0, tiles, slots, key_tiles, first, last = workspace
    pitch = tl.minimum(tiles, slots) * BLOCK
    row = (g * key_tiles - low_key(tile0, last, BLOCK)) * BLOCK + j0
    low = low_query(j0 // BLOCK, first, BLOCK, CAUSAL)
    column = (tile_i - tl.maximum(low, tile0)) * BLOCK
    n = tl.arange(0, STEP)[:, None]
    return bands + stride_side + (row * pitch + column) + n * pitch + tl.arange(0, BLOCK)[None, :]


@triton.jit
def narrowed(scores, dtype: tl.constexpr):
    """float32 as the workspace holds it: float16 in the place of bfloat16."""
    if dtype == tl.bfloat16:
        return scores.to(tl.float16).to(tl.bfloat16, bitcast=True)
    else:
        return scores.to(dtype)


@triton.jit
def widened(scores):
    """The inverse of narrowed."""
    if scores.dtype == tl.bfloat16:
        return scores.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return scores.to(tl.float32)


@triton.jit
def position_scores(
    workspace,
    tile_i,
    j0,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    C2P: tl.constexpr,
    P2C: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """float32 [BLOCK, STEP]: c2p + p2c of a tile's queries and near keys. The product q . k starts
    from them, so that scores stay in the layout of matrix instructions."""
    if C2P and P2C:
        c2p = widened(tl.load(c2p_tile(workspace, tile_i, j0, BLOCK, STEP)))
        p2c = widened(tl.load(p2c_tile(workspace, tile_i, j0, BLOCK, STEP, CAUSAL)))
        return c2p + tl.trans(p2c)
    elif C2P:
        return widened(tl.load(c2p_tile(workspace, tile_i, j0, BLOCK, STEP)))
    else:
        p2c = tl.load(p2c_tile(workspace, tile_i, j0, BLOCK, STEP, CAUSAL))
        return tl.trans(widened(p2c))


@triton.jit(do_not_specialize=SIZES)
def band_kernel(
    query,
    key,
    expanded,
    bands,
    cu_seqlens,
    spans,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_side,
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
    row_blocks,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: ROWS rows of one residue, of one head and side, against all distances near them.

    stride_side: elements of side 0. group, tile0: first head and query tile of the workspace, which
    holds `tiles` query tiles a head, each with `slots` key tiles, of `key_tiles` in all.
    """
    pid = tl.program_id(0)
    side = tl.program_id(1) + FIRST_SIDE
    residue = pid % 8
    g = pid // 8 // row_blocks
    head, b = (group + g) // batch, (group + g) % batch
    start, length, _, _ = sequence(b, cu_seqlens, spans, max_seqlen)
    end = tl.cdiv(length, BLOCK) * BLOCK
    limits = side_limits(side, g, end, tile0, tiles, slots, key_tiles, first, last, BLOCK, CAUSAL)
    x0 = limits[0] + pid // 8 % row_blocks * (8 * ROWS)
    if x0 >= end:
        return
    low, high = column_range(x0, end, limits, ROWS, BLOCK)

    a = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    d = tl.arange(0, D)
    x = x0 + 8 * a + residue
    if side == 0:
        content = query + (start + x0) * stride_qt + head.to(tl.int64) * stride_qh
        stride = stride_qt
    else:
        content = key + (start + x0) * stride_kt + head.to(tl.int64) * stride_kh
        stride = stride_kt
    inside = (x < length)[:, None] & (d < HEAD_DIM)[None, :]
    rows = tl.load(content + (8 * a + residue)[:, None] * stride + d[None, :], inside, other=0.0)

    band = bands + side * stride_side
    table = expanded + (side * heads + head).to(tl.int64) * 2 * reach * D
    for c0 in tl.range(low, high, COLUMNS, num_stages=STAGES):
        t = tl.load(table + (c0 - residue + reach + c)[:, None] * D + d[None, :])
        scores = tl.dot(rows, tl.trans(t), input_precision=PRECISION)
        place, near = octets(x, c0, residue, limits, BLOCK, COLUMNS)
        tl.store(band + place, narrowed(scores, bands.dtype.element_ty), mask=near)


@triton.jit(do_not_specialize=SIZES)
def position_content_kernel(
    expanded,
    bands,
    dquery_sum,
    dkey_sum,
    dquery,
    dkey,
    cu_seqlens,
    spans,
    stride_side,
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
    row_blocks,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The way back of band_kernel to queries and keys: one program adds to ROWS rows of dquery_sum
    or dkey_sum (float32) what their gradients by distance give, and writes the gradient.

    ACCUMULATE: dkey_sum is not complete yet and is written instead.
    """
    pid = tl.program_id(0)
    side = tl.program_id(1) + FIRST_SIDE
    residue = pid % 8
    g = pid // 8 // row_blocks
    head, b = (group + g) // batch, (group + g) % batch
    start, length, padded, _ = sequence(b, cu_seqlens, spans, max_seqlen)
    end = tl.cdiv(length, BLOCK) * BLOCK
    limits = side_limits(side, g, end, tile0, tiles, slots, key_tiles, first, last, BLOCK, CAUSAL)
    x0 = limits[0] + pid // 8 % row_blocks * (8 * ROWS)
    if x0 >= padded:
        return
    low, high = column_range(x0, end, limits, ROWS, BLOCK)

    a = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    d = tl.arange(0, D)
    x = x0 + 8 * a + residue
    band = bands + side * stride_side
    table = expanded + (side * heads + head).to(tl.int64) * 2 * reach * D
    acc = tl.zeros([ROWS, D], tl.float32)
    for c0 in tl.range(low, high, COLUMNS, num_stages=STAGES):
        t = tl.load(table + (c0 - residue + reach + c)[:, None] * D + d[None, :])
        place, near = octets(x, c0, residue, limits, BLOCK, COLUMNS)
        dscores = tl.load(band + place, mask=near, other=0.0)
        acc = tl.dot(dscores, t, acc, input_precision=PRECISION)

    rows = tl.where(side == 0, tiles, key_tiles) * BLOCK
    held = x < limits[0] + rows
    y0, y1, _ = near_columns(x, limits, BLOCK)
    place = (start + x0) * heads * HEAD_DIM + head * HEAD_DIM
    place += (8 * a + residue)[:, None] * (heads * HEAD_DIM) + d[None, :]
    # Also rows without a near tile, of the padding, end here.
    inside = (held & (x < padded))[:, None] & (d < HEAD_DIM)[None, :]
    if side == 0:
        acc += tl.load(dquery_sum + place, mask=inside, other=0.0)
        acc *= softmax_scale
        tl.store(dquery + place, acc.to(dquery.dtype.element_ty), mask=inside)
    else:
        if ACCUMULATE:
            inside &= ((y1 > y0) & (x < length))[:, None]
        acc += tl.load(dkey_sum + place, mask=inside, other=0.0)
        if ACCUMULATE:
            tl.store(dkey_sum + place, acc, mask=inside)
        else:
            acc *= softmax_scale
            tl.store(dkey + place, acc.to(dkey.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def position_table_kernel(
    query,
    key,
    bands,
    partial,
    cu_seqlens,
    spans,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_side,
    batch,
    heads,
    max_seqlen,
    first,
    last,
    reach,
    group,
    group_size,
    tile0,
    tiles,
    slots,
    key_tiles,
    row_blocks,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The way back of band_kernel to the tables: one program sums COLUMNS distances of one residue
    and head over all sequences and rows of the group, always in the same order.

    partial: float32 [2 sides, 8 residues, heads, 2 * reach, D], which groups add to one by one.
    """
    pid = tl.program_id(0)
    side = tl.program_id(1) + FIRST_SIDE
    residue = pid % 8
    chunks = 2 * reach // COLUMNS - 1
    head = group // batch + pid // 8 // chunks
    c0 = (pid // 8 % chunks + 1) * COLUMNS - reach

    a = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    d = tl.arange(0, D)
    if side == 0:
        content = query + head.to(tl.int64) * stride_qh
        stride = stride_qt
    else:
        content = key + head.to(tl.int64) * stride_kh
        stride = stride_kt
    band = bands + side * stride_side
    acc = tl.zeros([COLUMNS, D], tl.float32)
    b_low = tl.maximum(group - head * batch, 0)
    b_high = tl.minimum(group + group_size - head * batch, batch)
    for b in range(b_low, b_high):
        g = head * batch + b - group
        start, length, _, _ = sequence(b, cu_seqlens, spans, max_seqlen)
        end = tl.cdiv(length, BLOCK) * BLOCK
        limits = side_limits(
            side, g, end, tile0, tiles, slots, key_tiles, first, last, BLOCK, CAUSAL
        )
        # Of the blocks of rows, those that meet these distances: 0 <= x0 + 8 a + c < end.
        base = limits[0]
        low = base + tl.maximum(-c0 - COLUMNS - base, 0) // (8 * ROWS) * (8 * ROWS)
        for x0 in tl.range(low, tl.minimum(limits[1], end - c0), 8 * ROWS, num_stages=STAGES):
            x = x0 + 8 * a + residue
            place, near = octets(x, c0, residue, limits, BLOCK, COLUMNS)
            dscores = tl.load(band + place, mask=near, other=0.0)
            rows = content + (start + x0) * stride
            inside = (x < length)[:, None] & (d < HEAD_DIM)[None, :]
            rows = rows + (8 * a + residue)[:, None] * stride + d[None, :]
            rows = tl.load(rows, mask=inside, other=0.0)
            acc = tl.dot(tl.trans(dscores), rows, acc, input_precision=PRECISION)

    slot = ((side * 8 + residue) * heads + head).to(tl.int64)
    place = partial + slot * 2 * reach * D
    place = place + (c0 - residue + reach + c)[:, None] * D + d[None, :]
    if (group > head * batch) | (tile0 > 0):
        acc += tl.load(place)
    tl.store(place, acc)
