"""The compiled CPU kernels (csrc/cpu): every argument of the op in float32, bfloat16 and float16.

The instruction set is chosen when the kernels run; the environment variable
FASTDEBERTA_CPU_KERNELS names another of those that the machine has (see `fastdeberta info`).
"""

import json
import os
from functools import cache

import torch
from torch import Tensor

from .. import libraries
from . import AttentionParams

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Offsets within a head's table and within a sequence are 32-bit.
_LONGEST = 2**24


def unavailable() -> str | None:
    return libraries.load("_C")


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    if query.device.type != "cpu":
        return f"it takes tensors on the CPU, not on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if params.max_seqlen > _LONGEST:
        return f"it takes sequences of at most {_LONGEST} tokens, not {params.max_seqlen}"
    return None


@cache
def kernels() -> list[str]:
    """Names of the kernels that this machine can run, the fastest first."""
    return json.loads(torch.ops.fastdeberta_C.build_info())["cpu_kernels"]


def _chosen() -> int:
    name = os.environ.get("FASTDEBERTA_CPU_KERNELS")
    if not name:
        return 0
    if name not in kernels():
        raise ValueError(
            f"FASTDEBERTA_CPU_KERNELS must be one of {', '.join(kernels())} on this machine, "
            f"got {name!r}"
        )
    return kernels().index(name)


def _dense(x: Tensor | None) -> Tensor | None:
    """Kernels read any strides but one."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _options(params: AttentionParams) -> tuple:
    rows, first, last = params.rows or (None, 0, 0)
    return (
        None if params.cu_seqlens is None else params.cu_seqlens.contiguous(),
        None if params.key_mask is None else params.key_mask.contiguous(),
        rows,
        first,
        last,
        params.rng_state,
        params.max_seqlen,
        params.causal,
        params.dropout_p,
        params.softmax_scale,
        params.uniform_padding,
        _chosen(),
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]; see the package's docstring."""
    inputs = map(_dense, (query, key, value, pos_key, pos_query))
    return torch.ops.fastdeberta_C.attention_forward(*inputs, *_options(params))


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
    inputs = map(_dense, (dout, query, key, value, pos_key, pos_query))
    *grads, dpos_key, dpos_query = torch.ops.fastdeberta_C.attention_backward(
        *inputs, out.contiguous(), lse.contiguous(), *_options(params)
    )
    return (
        *grads,
        None if pos_key is None else dpos_key,
        None if pos_query is None else dpos_query,
    )
