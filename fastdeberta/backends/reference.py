"""The oracle: composed PyTorch, any device, any floating dtype, forward and backward by hand.

Scores are held whole, for a few heads at a time; position terms in distance space: with one column
a distance, c2p[i, j] = bands[i, j - i + L - 1], which is a strided view of the matrix product
Q · tableᵀ. No index of L * L elements is ever made.
float16 and bfloat16 inputs are computed in float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import keep_mask
from . import AttentionParams

_SCORES_AT_ONCE = 2**20


def unavailable() -> str | None:
    return None


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    return None


class _Grid(NamedTuple):
    """Packed tokens as a padded grid of sequences."""

    batch: int
    length: int
    slots: Tensor | None  # [T]: each token's place in the grid; None: the grid has no gaps
    valid: Tensor | None  # [B, L] bool: tokens to attend to; None: all
    lengths: Tensor | None  # [B]: tokens of each sequence; None: all `length`

    def spread(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [H, B, L, D] in the dtype of the computation; gaps are zero."""
        x = x.to(_compute_dtype(x))
        if self.slots is not None:
            grid = x.new_zeros(self.batch * self.length, *x.shape[1:])
            x = grid.index_copy_(0, self.slots, x)
        return x.reshape(self.batch, self.length, *x.shape[1:]).permute(2, 0, 1, 3)

    def gather(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[H, B, L, D] -> [T, H, D]: the inverse of spread."""
        x = x.permute(1, 2, 0, 3).reshape(self.batch * self.length, x.size(0), x.size(3))
        if self.slots is not None:
            x = x[self.slots]
        return x.to(dtype).contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _grid(query: Tensor, params: AttentionParams) -> _Grid:
    tokens, length = query.size(0), params.max_seqlen
    mask = params.key_mask
    cu = params.cu_seqlens
    batch = tokens // max(length, 1) if cu is None else cu.numel() - 1
    if cu is None or tokens == batch * length:
        valid = None if mask is None else mask.view(batch, length)
        return _Grid(batch, length, None, valid, None)
    cu = cu.long()
    lengths = cu.diff()
    sequence = torch.repeat_interleave(torch.arange(batch, device=cu.device), lengths)
    slots = torch.arange(tokens, device=cu.device) - cu[sequence] + sequence * length
    valid = torch.zeros(batch * length, dtype=torch.bool, device=cu.device)
    valid[slots] = True if mask is None else mask
    return _Grid(batch, length, slots, valid.view(batch, length), lengths)


def _skew(bands: Tensor) -> Tensor:
    """[..., L, 2L - 1] -> view [..., L, L] whose element (a, b) is bands[a, b - a + L - 1]."""
    length, width = bands.shape[-2:]
    shape, strides = bands.shape[:-1] + (length,), bands.stride()[:-2] + (width - 1, 1)
    return bands.as_strided(shape, strides, bands.storage_offset() + max(length - 1, 0))


def _unskew(scores: Tensor) -> Tensor:
    """The transpose of _skew: each score goes to its distance's column."""
    length = scores.size(-1)
    bands = scores.new_zeros(*scores.shape[:-1], max(2 * length - 1, 0))
    _skew(bands).copy_(scores)
    return bands


class _Positions:
    """One position term: from rows to distances, and the way back."""

    def __init__(self, table: Tensor, params: AttentionParams, sign: int):
        """sign: +1 if columns run by distance i - j (p2c), -1 if by j - i (c2p)."""
        assert params.rows is not None
        reach = params.max_seqlen - 1
        distances = torch.arange(-reach, reach + 1, device=table.device) * sign
        self.rows = params.rows.lookup(distances)  # [2L - 1]
        self.shape, self.dtype = table.shape, table.dtype
        # The product is made with whichever are fewer, distances or rows.
        self.by_row = self.rows.numel() > table.size(0)
        table = table.to(_compute_dtype(table))
        self.table = (table if self.by_row else table[self.rows]).transpose(0, 1)  # [H, n, D]

    def scores(self, content: Tensor) -> Tensor:
        """[H, B, L, D] -> [H, B, L, L]: content · table, skewed."""
        heads, batch, length, _ = content.shape
        bands = content.flatten(1, 2) @ self.table.transpose(1, 2)  # [H, B * L, n]
        if self.by_row:
            bands = bands.flatten(0, 1).index_select(1, self.rows)  # Much faster in two dimensions.
        return _skew(bands.view(heads, batch, length, -1))

    def backward(self, dscores: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the content [H, B, L, D] and of the table [rows, H, D]."""
        bands = _unskew(dscores).flatten(1, 2)  # [H, B * L, 2L - 1]
        if self.by_row:
            by_row = bands.new_zeros(*bands.shape[:2], self.shape[0])
            bands = by_row.scatter_add_(-1, self.rows.expand_as(bands), bands)
        dcontent = (bands @ self.table).view(content.shape)
        dtable = (bands.transpose(1, 2) @ content.flatten(1, 2)).transpose(0, 1)  # [n, H, D]
        if not self.by_row:
            dtable = dtable.new_zeros(self.shape).index_add_(0, self.rows, dtable)
        return dcontent, dtable.to(self.dtype).contiguous()


def _scores(q: Tensor, k: Tensor, c2p: _Positions | None, p2c: _Positions | None) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    if c2p is not None:
        scores += c2p.scores(q)
    if p2c is not None:
        scores += p2c.scores(k).transpose(-1, -2)
    return scores


def _masked(scores: Tensor, grid: _Grid, causal: bool) -> Tensor:
    """Sets to -inf what is not attended to: masked keys, the future, and masked queries' rows."""
    if grid.valid is not None:
        attend = grid.valid[:, None, :] & grid.valid[:, :, None]
        scores.masked_fill_(~attend, -torch.inf)
    if causal:
        future = torch.ones(grid.length, grid.length, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(future.triu(1), -torch.inf)
    return scores


def _normalize(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse); a row without a key (lse = -inf) gives zeros, not NaN."""
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()


def _uniform_rows(probs: Tensor, grid: _Grid) -> Tensor:
    """Masked queries average every token of their sequence, as softmax of a constant row does."""
    if grid.valid is None:
        return probs
    if grid.lengths is None:
        average: Tensor | float = 1 / max(grid.length, 1)
    else:
        position = torch.arange(grid.length, device=probs.device)
        inside = position < grid.lengths[:, None]
        average = (inside.to(probs.dtype) / grid.lengths.clamp(min=1)[:, None])[:, None, :]
    return torch.where(grid.valid[:, :, None], probs, average)


def _keep(grid: _Grid, heads: int, params: AttentionParams) -> Tensor | None:
    """The probabilities that dropout keeps, bool [H, B, L, L]; None: no dropout."""
    if params.rng_state is None:
        return None
    length = grid.length
    keep = keep_mask(params.rng_state, grid.batch, heads, length, length, params.dropout_p)
    return keep.transpose(0, 1)


def _keep_scale(keep: Tensor | None, params: AttentionParams, probs: Tensor) -> Tensor | None:
    """What dropout multiplies probabilities with, like them; None: no dropout."""
    return None if keep is None else keep.to(probs.dtype) / (1 - params.dropout_p)


def _position_terms(
    pos_key: Tensor | None, pos_query: Tensor | None, params: AttentionParams
) -> tuple[_Positions | None, _Positions | None]:
    c2p = None if pos_key is None else _Positions(pos_key, params, -1)
    p2c = None if pos_query is None else _Positions(pos_query, params, 1)
    return c2p, p2c


def _head_parts(grid: _Grid, heads: int) -> list[slice]:
    """Heads in groups whose scores fit a cache: memory used again costs no page faults."""
    size = max(1, _SCORES_AT_ONCE // max(1, grid.batch * grid.length**2))
    return [slice(head, head + size) for head in range(0, max(heads, 1), size)]


def _cut(table: Tensor | None, part: slice) -> Tensor | None:
    return None if table is None else table[:, part]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]; see the package's docstring."""
    grid = _grid(query, params)
    keep = _keep(grid, query.size(1), params)
    parts = [
        _forward(
            query[:, part],
            key[:, part],
            value[:, part],
            _cut(pos_key, part),
            _cut(pos_query, part),
            params,
            grid,
            None if keep is None else keep[part],
        )
        for part in _head_parts(grid, query.size(1))
    ]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, 1), torch.cat(lse)


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, pos_key and pos_query, from the saved lse."""
    grid = _grid(query, params)
    keep = _keep(grid, query.size(1), params)
    parts = [
        _backward(
            dout[:, part],
            query[:, part],
            key[:, part],
            value[:, part],
            _cut(pos_key, part),
            _cut(pos_query, part),
            out[:, part],
            lse[part],
            params,
            grid,
            None if keep is None else keep[part],
        )
        for part in _head_parts(grid, query.size(1))
    ]
    dq, dk, dv, *tables = zip(*parts, strict=True)
    dpos_key, dpos_query = (None if x[0] is None else torch.cat(x, 1) for x in tables)
    return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1), dpos_key, dpos_query


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
    grid: _Grid,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """forward for some heads, which are all that the tensors hold."""
    q, k, v = grid.spread(query), grid.spread(key), grid.spread(value)
    if query.numel() == 0:
        return torch.empty_like(query).contiguous(), q.new_empty(query.size(1), query.size(0))

    scores = _scores(q, k, *_position_terms(pos_key, pos_query, params)).mul_(params.softmax_scale)
    scores = _masked(scores, grid, params.causal)
    lse = scores.logsumexp(-1)  # [H, B, L]
    probs = _normalize(scores, lse)
    if params.uniform_padding:
        probs = _uniform_rows(probs, grid)
    keep = _keep_scale(keep, params, probs)
    out = (probs if keep is None else probs * keep) @ v
    lse = grid.gather(lse.unsqueeze(-1), lse.dtype)[..., 0].t().contiguous()
    return grid.gather(out, query.dtype), lse


def _backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    grid: _Grid,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """backward for some heads, which are all that the tensors hold."""
    q, k, v, do = grid.spread(query), grid.spread(key), grid.spread(value), grid.spread(dout)
    if query.numel() == 0:
        dpos_key, dpos_query = (
            None if table is None else torch.zeros_like(table) for table in (pos_key, pos_query)
        )
        dq, dk, dv = (torch.zeros_like(x).contiguous() for x in (query, key, value))
        return dq, dk, dv, dpos_key, dpos_query

    c2p, p2c = _position_terms(pos_key, pos_query, params)
    scores = _scores(q, k, c2p, p2c).mul_(params.softmax_scale)
    rows = grid.spread(lse.t().unsqueeze(-1))[..., 0]
    probs = _normalize(_masked(scores, grid, params.causal), rows)
    keep = _keep_scale(keep, params, probs)

    used = _uniform_rows(probs, grid) if params.uniform_padding else probs
    dv = (used if keep is None else used * keep).transpose(-1, -2) @ do
    dprobs = do @ v.transpose(-1, -2)
    if keep is not None:
        dprobs *= keep
    delta = (do * grid.spread(out)).sum(-1, keepdim=True)
    # Uniform rows are constants of q and k: their probs are zero here, and so is their dscores.
    dscores = dprobs.sub_(delta).mul_(probs).mul_(params.softmax_scale)

    dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
    dpos_key = dpos_query = None
    if c2p is not None:
        dcontent, dpos_key = c2p.backward(dscores, q)
        dq += dcontent
    if p2c is not None:
        dcontent, dpos_query = p2c.backward(dscores.transpose(-1, -2), k)
        dk += dcontent
    return (
        grid.gather(dq, query.dtype),
        grid.gather(dk, key.dtype),
        grid.gather(dv, value.dtype),
        dpos_key,
        dpos_query,
    )
