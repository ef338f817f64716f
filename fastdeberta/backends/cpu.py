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
from . import AttentionParams, compiled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = "fastdeberta_C"


def unavailable() -> str | None:
    return libraries.load("_C")


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    if query.device.type != "cpu":
        return f"it takes tensors on the CPU, not on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if params.max_seqlen > compiled.LONGEST:
        return f"it takes sequences of at most {compiled.LONGEST} tokens, not {params.max_seqlen}"
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


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Kernels read any strides but one."""
    return tuple(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]; see the package's docstring."""
    inputs = _dense(query, key, value, pos_key, pos_query)
    return compiled.forward(_LIBRARY, inputs, params, _chosen())


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
    inputs = _dense(dout, query, key, value, pos_key, pos_query)
    return compiled.backward(_LIBRARY, inputs, out, lse, params, _chosen())
