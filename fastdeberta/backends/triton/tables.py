"""Position tables by distance instead of by row, and gradients from distances back to rows.

By distance, a tile needs a run of consecutive rows of a table, and nothing is gathered. Row t of
side 0 (c2p) stands for j - i = t - reach, of side 1 (p2c) for i - j = t - reach.
"""

import triton
import triton.language as tl

from .tiles import SIZES


@triton.jit(do_not_specialize=SIZES)
def expand_kernel(
    pos_key,
    pos_query,
    rows,
    expanded,
    stride_ct,
    stride_ch,
    stride_pt,
    stride_ph,
    heads,
    first,
    last,
    reach,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
):
    """One program: BLOCK distances of one head and side. expanded: [2, heads, 2 * reach, D]."""
    side = tl.program_id(2) + FIRST_SIDE
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)[None, :]
    distance = tl.where(side == 0, reach - t, t - reach)
    row = tl.load(rows + tl.minimum(tl.maximum(distance, first), last) - first)[:, None]
    if side == 0:
        x = pos_key + head.to(tl.int64) * stride_ch + row * stride_ct
    else:
        x = pos_query + head.to(tl.int64) * stride_ph + row * stride_pt
    x = tl.load(x + d, mask=d < HEAD_DIM, other=0.0)
    place = expanded + (side * heads + head).to(tl.int64) * 2 * reach * D
    tl.store(place + t[:, None] * D + d, x, mask=(t < 2 * reach)[:, None])


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(
    partial,
    query_ends,
    key_ends,
    rows,
    dpos_key,
    dpos_query,
    heads,
    first,
    last,
    reach,
    margin,
    ends,
    table_rows,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_SIDE: tl.constexpr,
    HAS_FAR: tl.constexpr,
):
    """One program: BLOCK rows of one head's table. Their distances are consecutive, and so are
    their parts of `partial`.

    partial: float32 [2 sides, 8, heads, 2 * reach, D], of which `margin` rows at either end mean
    nothing. query_ends, key_ends: float32 [2, heads, ends, D], what far tiles left (0) and right
    (1) of the near ones give.
    """
    side = tl.program_id(2) + FIRST_SIDE
    head = tl.program_id(1)
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, D)[None, :]
    row = tl.program_id(0) * BLOCK + n

    below = 0  # How many distances have a lower row, and how many no higher one.
    upto = 0
    for x0 in range(first, last + 1, BLOCK):
        of_distance = tl.load(rows + x0 - first + n, mask=x0 + n <= last, other=2147483647)
        below += tl.sum((of_distance < tl.program_id(0) * BLOCK).to(tl.int32), 0)
        upto += tl.sum((of_distance < tl.program_id(0) * BLOCK + BLOCK).to(tl.int32), 0)
    # The first and the last row also serve what lies beyond saturation, and short sequences do not
    # reach all rows.
    low = tl.maximum(tl.where(below == 0, margin - reach, first + below), margin - reach)
    high = tl.where(upto == last - first + 1, reach - margin + 1, first + upto)
    high = tl.minimum(high, reach - margin + 1)

    acc = tl.zeros([BLOCK, D], tl.float32)
    for x0 in range(low, tl.where(upto == below, low, high), BLOCK):
        distance = x0 + n
        t = tl.where(side == 0, reach - distance, reach + distance)[:, None]
        x = tl.zeros([BLOCK, D], tl.float32)
        for residue in range(8):
            slot = ((side * 8 + residue) * heads + head).to(tl.int64) * 2 * reach
            x += tl.load(partial + (slot + t) * D + d, mask=(distance < high)[:, None], other=0.0)
        of_distance = tl.load(rows + tl.minimum(tl.maximum(distance, first), last) - first)
        member = (of_distance[None, :] == row[:, None]).to(tl.float32)  # [row, distance]
        acc = tl.dot(member, x, acc, input_precision="ieee")
    if HAS_FAR:
        of_side = query_ends
        if side == 1:
            of_side = key_ends
        for end in range(2):
            beyond = tl.load(rows + tl.where(end == 0, last - first, 0))
            slot = (end * heads + head).to(tl.int64)
            for e0 in range(0, ends, BLOCK):
                e = (e0 + n)[:, None]
                x = tl.load(of_side + (slot * ends + e) * D + d, mask=e < ends, other=0.0)
                acc += tl.where(row == beyond, 1.0, 0.0)[:, None] * tl.sum(x, 0)[None, :]
    inside = (row < table_rows)[:, None] & (d < HEAD_DIM)
    place = (row[:, None] * heads + head).to(tl.int64) * HEAD_DIM + d
    acc *= softmax_scale
    if side == 0:
        tl.store(dpos_key + place, acc.to(dpos_key.dtype.element_ty), mask=inside)
    else:
        tl.store(dpos_query + place, acc.to(dpos_query.dtype.element_ty), mask=inside)
