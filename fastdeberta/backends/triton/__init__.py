"""Triton kernels for GPUs: float16, bfloat16 and float32, head dims up to 256.

Near tiles read position scores from bands that are made for a group of heads at a time, so that a
workspace of bounded size, small enough for the GPU's cache, serves any batch and length. Nothing
here waits for the device, and every sum has a fixed order.

Under TRITON_INTERPRET=1 the kernels run on tensors of the CPU.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import AttentionParams, constant

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LONGEST = 2**24  # Positions and distances are 32-bit.
_LARGEST_HEAD = 256


def unavailable() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'fastdeberta[triton]')"
    if not _interpreted() and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


@constant
@cache
def _interpreted() -> bool:
    """As triton sees it, which reads TRITON_INTERPRET when it is imported."""
    import triton

    return not isinstance(triton.language.zeros, triton.runtime.JITFunction)


@constant
def _multiplies_bfloat16() -> bool:
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    if not _interpreted():
        return True
    from triton.runtime.interpreter import InterpreterBuilder

    return InterpreterBuilder.create_dot.__module__ != InterpreterBuilder.__module__


def yields(query: Tensor, params: AttentionParams) -> str | None:
    return "its interpreter is for tests, slow, and taken only by name" if _interpreted() else None


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    device = "cpu" if _interpreted() else "cuda"
    if query.device.type != device:
        return f"it takes tensors on {device}, not on {query.device}"
    if query.dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {query.dtype}"
    if query.dtype == torch.bfloat16 and not _multiplies_bfloat16():
        return "Triton's interpreter computes wrong products in bfloat16"
    if query.size(-1) > _LARGEST_HEAD:
        return f"it takes head dims up to {_LARGEST_HEAD}, not {query.size(-1)}"
    if params.max_seqlen > _LONGEST:
        return f"it takes sequences of at most {_LONGEST} tokens, not {params.max_seqlen}"
    if params.softmax_scale <= 0:
        return f"it takes a softmax_scale above 0, not {params.softmax_scale}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]; see the package's docstring."""
    from . import launch

    return launch.forward(query, key, value, pos_key, pos_query, params)


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
    from . import launch

    return launch.backward(dout, query, key, value, pos_key, pos_query, out, lse, params)
