"""From a call of the op to launches: shapes, groups of heads, workspaces, configurations."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import AttentionParams
from . import configs
from .backward_kernels import dkv_kernel, dq_kernel, near_dkv_kernel
from .bands import band_kernel, position_content_kernel, position_table_kernel
from .configs import Config, Launch
from .forward_kernel import forward_kernel
from .tables import expand_kernel, fold_kernel
from .tiles import spans_kernel

Result = TypeVar("Result")

_LOG2_E = 1.4426950408889634
_FOLD_BLOCK = 16
_TABLE_BLOCK = 64
_SPANS_BLOCK = 1024

# Bytes of bands at a time, at the least; more where the device's cache has room for it.
_WORKSPACE = 32 * 2**20


@dataclass(frozen=True)
class Group:
    """What one workspace holds: heads (head * batch + sequence) and query tiles of each."""

    first: int
    size: int
    tile0: int
    tiles: int


@dataclass(frozen=True)
class Plan:
    """How near tiles are split into groups.

    tiles: query tiles of the longest sequence. slots: near key tiles of a query tile, at most.
    group_tiles, key_tiles: query tiles of a group, and key tiles near them. reach: half of the
    tables by distance. far: some tiles are far.
    """

    groups: list[Group]
    tiles: int
    slots: int
    group_tiles: int
    key_tiles: int
    reach: int
    far: bool

    @property
    def side(self) -> int:
        """Tiles of a head's bands on side 0."""
        return self.group_tiles * self.slots

    @property
    def both(self) -> int:
        """Tiles of a head's bands on both sides."""
        return self.side + self.key_tiles * min(self.group_tiles, self.slots)


def has_far(max_seqlen: int, first: int, last: int, block: int, causal: bool) -> bool:
    """Whether any tile's distances all lie beyond one saturation distance; see tiles.near_keys."""
    tiles = -(-max_seqlen // block)
    left = (tiles - 1) * block - last + 1 >= block
    return left or (not causal and (2 * block - 2 - first) // block < tiles)


def plan(
    sequences: int,
    max_seqlen: int,
    first: int,
    last: int,
    causal: bool,
    config: Config,
    tile_bytes: int,
    workspace: int,
) -> Plan:
    """Groups of whole heads, or of some query tiles of one head, whose bands fit the workspace.

    sequences: times heads. tile_bytes: of one tile of one side.
    """
    block = config.block
    tiles = -(-max_seqlen // block)
    slots = min(tiles, (2 * block - 2 - first) // block + -(-(last - 1) // block))
    far = has_far(max_seqlen, first, last, block, causal)
    near = max(-first, last) + 2 * block
    step = max(config.columns, _TABLE_BLOCK)
    reach = -(-(min(near, tiles * block + 8 * config.rows) + 16) // step) * step + step

    def made(group_tiles: int, groups: list[Group]) -> Plan:
        # A group's key tiles: from the first near its first query tile to the last near its last.
        key_tiles = min(tiles, group_tiles + slots)
        return Plan(groups, tiles, slots, group_tiles, key_tiles, reach, far)

    whole = made(tiles, [])
    heads = workspace // max(1, whole.both * tile_bytes)
    if heads:
        count = -(-sequences // max(1, min(heads, sequences)))
        size = -(-sequences // max(1, count))
        firsts = range(0, sequences, max(1, size))
        return made(tiles, [Group(f, min(size, sequences - f), 0, tiles) for f in firsts])
    group_tiles = max(1, workspace // (2 * slots * tile_bytes))
    while group_tiles > 1 and made(group_tiles, []).both * tile_bytes > workspace:
        group_tiles -= 1
    return made(
        group_tiles,
        [
            Group(head, 1, tile0, min(group_tiles, tiles - tile0))
            for head in range(sequences)
            for tile0 in range(0, tiles, group_tiles)
        ],
    )


@cache
def workspace_bytes(device: torch.device) -> int:
    """Bytes of bands at a time on a device."""
    if device.type != "cuda":
        return _WORKSPACE
    cache_size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return max(_WORKSPACE, cache_size * 3 // 4)


def launch(kernel: Any, grid: tuple[int, ...], how: Launch, values: dict[str, Any]) -> None:
    """Launches a kernel on those of `values` that it has parameters for."""
    if math.prod(grid):
        arguments = {name: values[name] for name in kernel.arg_names}
        kernel[grid](**arguments, num_warps=how.warps, num_stages=how.stages)


# Smaller configurations that devices turned out to need, in place of those that were chosen.
_SHRUNK: dict[tuple[torch.device, bool, Config], Config] = {}


def _fitting(
    device: torch.device, backward: bool, config: Config, run: Callable[[Config], Result]
) -> Result:
    """run(config), or with a smaller one where the device has too little shared memory."""
    chosen = config
    config = _SHRUNK.get((device, backward, chosen), chosen)
    while True:
        try:
            return run(config)
        except OutOfResources:
            smaller = config.smaller()
            if smaller is None:
                raise
            _SHRUNK[device, backward, chosen] = config = smaller


def _dense(x: Tensor) -> Tensor:
    """Kernels read any strides but one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> dict[str, Any]:
    """What kernels' parameters have in common, by name."""
    tokens, heads, head_dim = query.shape
    cu_seqlens = params.cu_seqlens
    max_seqlen = params.max_seqlen
    batch = tokens // max(1, max_seqlen) if cu_seqlens is None else cu_seqlens.numel() - 1
    rows, first, last = params.rows or (None, 0, 0)
    query, key, value = map(_dense, (query, key, value))
    pos_key = None if pos_key is None else _dense(pos_key)
    pos_query = None if pos_query is None else _dense(pos_query)
    c2p, p2c = pos_key is not None, pos_query is not None
    # Without dropout the generator's numbers play no part.
    dropout_p = params.dropout_p if params.rng_state is not None else 0.0
    return {
        "query": query,
        "key": key,
        "value": value,
        # Kernels choose between sides when they run: both must be there, if only to be passed.
        "pos_key": pos_query if pos_key is None else pos_key,
        "pos_query": pos_key if pos_query is None else pos_query,
        "stride_qt": query.stride(0),
        "stride_qh": query.stride(1),
        "stride_kt": key.stride(0),
        "stride_kh": key.stride(1),
        "stride_vt": value.stride(0),
        "stride_vh": value.stride(1),
        "stride_ct": pos_key.stride(0) if pos_key is not None else 0,
        "stride_ch": pos_key.stride(1) if pos_key is not None else 0,
        "stride_pt": pos_query.stride(0) if pos_query is not None else 0,
        "stride_ph": pos_query.stride(1) if pos_query is not None else 0,
        "rows": rows,
        "first": first,
        "last": last,
        "tokens": tokens,
        "heads": heads,
        "batch": batch,
        "max_seqlen": max_seqlen,
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "key_mask": None if params.key_mask is None else params.key_mask.contiguous(),
        "rng_state": params.rng_state,
        "threshold": int(dropout_p * 2**32),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "scale": params.softmax_scale * _LOG2_E,
        "softmax_scale": params.softmax_scale,
        "spans": None,
        "bands": None,
        "expanded": None,
        "reach": 0,
        "slots": 0,
        "stride_side": 0,
        "HEAD_DIM": head_dim,
        "D": max(16, triton.next_power_of_2(head_dim)),
        "C2P": c2p,
        "P2C": p2c,
        "FIRST_SIDE": 0 if c2p else 1,
        "CAUSAL": params.causal,
        "UNIFORM": params.uniform_padding,
        "PRECISION": _precision(query.dtype),
    }


def _sides(call: dict[str, Any]) -> int:
    return call["C2P"] + call["P2C"]


def _for_length(config: Config, max_seqlen: int) -> Config:
    """Programs of band_kernel take 8 * rows tokens: no more than there are."""
    rows = max(16, triton.next_power_of_2(-(-max_seqlen // 8)))
    return replace(config, rows=min(config.rows, rows))


def _prepare(call: dict[str, Any], config: Config) -> Plan:
    """Adds a configuration's sizes to the call, reads the mask, and lays the tables out."""
    query, max_seqlen, sequences = call["query"], call["max_seqlen"], call["batch"] * call["heads"]
    if call["key_mask"] is not None:
        call["spans"] = query.new_empty((call["batch"], 2), dtype=torch.int32)
        launch(spans_kernel, (call["batch"],), Launch(4, 1), call | {"BLOCK": _SPANS_BLOCK})
    call |= {"BLOCK": config.block, "STEP": min(config.step, config.block)}
    if not _sides(call):
        tiles = -(-max_seqlen // config.block)
        whole = [Group(0, sequences, 0, tiles)] if sequences and tiles else []
        return Plan(whole, tiles, 0, tiles, tiles, 0, True)
    made = plan(
        sequences,
        max_seqlen,
        call["first"],
        call["last"],
        call["CAUSAL"],
        config,
        config.block**2 * query.element_size(),
        workspace_bytes(query.device),
    )
    call |= {"reach": made.reach, "slots": made.slots, "key_tiles": made.key_tiles}
    call |= {"ROWS": config.rows, "COLUMNS": config.columns}
    sides, heads = _sides(call), call["heads"]
    call["expanded"] = query.new_empty((2, heads, 2 * made.reach, call["D"]))
    grid = (-(-2 * made.reach // _TABLE_BLOCK), heads, sides)
    launch(expand_kernel, grid, Launch(4, 1), call | {"BLOCK": _TABLE_BLOCK})
    return made


def _with_bands(call: dict[str, Any], made: Plan, config: Config) -> Iterator[dict[str, Any]]:
    """The call for each group, whose bands are made when it comes."""
    tile = config.block**2
    if _sides(call) and made.groups:
        largest = made.groups[0].size
        call["bands"] = call["query"].new_empty(largest * made.both * tile)
    for group in made.groups:
        part = call | {
            "group": group.first,
            "group_size": group.size,
            "tile0": group.tile0,
            "tiles": group.tiles,
            "key_tiles": made.key_tiles,
            "stride_side": group.size * group.tiles * made.slots * tile,
            "row_blocks": -(-made.key_tiles * config.block // (8 * config.rows)),
        }
        if _sides(call):
            grid = (8 * part["row_blocks"] * group.size, _sides(call))
            launch(band_kernel, grid, config.band, part | {"STAGES": config.band.stages})
        yield part


def _config(call: dict[str, Any], backward: bool) -> Config:
    query = call["query"]
    family = configs.family(query.device)
    longest = _sides(call) == 0 or call["max_seqlen"] > max(call["last"], -call["first"])
    chosen = configs.choose(family, backward, call["D"], query.dtype, longest)
    return _for_length(chosen, call["max_seqlen"])


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]."""
    call = _call(query, key, value, pos_key, pos_query, params)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty((query.size(1), query.size(0)), dtype=torch.float32)
    if query.numel() == 0:
        return out, lse
    call |= {"out": out, "lse": lse}

    def run(config: Config) -> None:
        ours = dict(call)
        made = _prepare(ours, config)
        how = config.forward
        ours |= {"HAS_FAR": made.far, "STAGES": how.stages}
        for part in _with_bands(ours, made, config):
            launch(forward_kernel, (part["tiles"] * part["group_size"],), how, part)

    with _on(query.device):
        _fitting(query.device, False, _config(call, False), run)
    return out, lse


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
    """Gradients of query, key, value, pos_key and pos_query."""
    call = _call(query, key, value, pos_key, pos_query, params)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query,) * 3]
    tables = [
        None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
        for x in (pos_key, pos_query)
    ]
    if query.numel() == 0:
        return grads[0], grads[1], grads[2], tables[0], tables[1]
    dout = _dense(dout)
    call |= {
        "dout": dout,
        "stride_dt": dout.stride(0),
        "stride_dh": dout.stride(1),
        "out": out.contiguous(),
        "lse": lse.contiguous(),
        "dpos_key": tables[1] if tables[0] is None else tables[0],
        "dpos_query": tables[0] if tables[1] is None else tables[1],
    }
    with _on(query.device):
        _fitting(
            query.device,
            True,
            _config(call, True),
            lambda config: _backward(dict(call), grads, config),
        )
    return grads[0], grads[1], grads[2], tables[0], tables[1]


def _backward(call: dict[str, Any], grads: list[Tensor], config: Config) -> None:
    query, heads, tokens = call["query"], call["heads"], call["tokens"]
    made = _prepare(call, config)
    near, c2p, p2c = bool(_sides(call)), call["C2P"], call["P2C"]
    # Far tiles, and groups that hold a part of a head's queries, leave keys' gradients in sums.
    accumulate = near and (made.far or made.group_tiles < made.tiles or call["UNIFORM"])
    final = accumulate or not near

    def sums(wanted: bool) -> Tensor | None:
        return torch.empty_like(grads[0], dtype=torch.float32) if wanted else None

    dquery_sum = sums(near)
    dkey_sum = sums(near)
    dvalue_sum = sums(accumulate)
    ends = call["batch"] * made.tiles
    per_side = (2, heads, ends, call["D"])

    def fp32(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    call |= {
        "HAS_FAR": made.far,
        "ACCUMULATE": accumulate,
        "offsets": fp32(2, heads, tokens) if made.far else None,
        "deltas": fp32(heads, tokens) if made.far else None,
        "query_ends": fp32(*per_side) if made.far and near else None,
        "key_ends": fp32(*per_side) if made.far and near else None,
        "ends": ends,
        "dquery_sum": dquery_sum,
        "dkey_sum": dkey_sum,
        "dvalue_sum": dvalue_sum,
        "partial": fp32(2, 8, heads, 2 * made.reach, call["D"]) if near else None,
    }
    dquery, dkey, dvalue = grads
    for part in _with_bands(call, made, config):
        size = part["group_size"]
        part["dquery"] = dquery_sum if c2p else dquery
        part["STAGES"] = config.dq.stages
        launch(dq_kernel, (part["tiles"] * size,), config.dq, part)
        if not near:
            continue
        part["dkey"] = dkey_sum if accumulate or p2c else dkey
        part["dvalue"] = dvalue_sum if accumulate else dvalue
        part["STAGES"] = config.near_dkv.stages
        launch(near_dkv_kernel, (part["key_tiles"] * size,), config.near_dkv, part)
        part |= {"dquery": dquery, "dkey": dkey, "STAGES": config.content.stages}
        grid = (8 * part["row_blocks"] * size, _sides(call))
        launch(position_content_kernel, grid, config.content, part)
        first, last = part["group"], part["group"] + size - 1
        touched = last // call["batch"] - first // call["batch"] + 1
        grid = (8 * (2 * made.reach // config.columns - 1) * touched, _sides(call))
        launch(position_table_kernel, grid, config.table, part | {"STAGES": config.table.stages})
    if final:
        call |= {"dkey": dkey, "dvalue": dvalue, "tiles": made.tiles, "STAGES": config.dkv.stages}
        launch(dkv_kernel, (made.tiles * call["batch"] * heads,), config.dkv, call)
    if near:
        table = call["dpos_key"]
        fold = {"margin": config.columns, "table_rows": table.size(0), "BLOCK": _FOLD_BLOCK}
        grid = (-(-table.size(0) // _FOLD_BLOCK), heads, _sides(call))
        launch(fold_kernel, grid, Launch(4, 1), call | fold)
