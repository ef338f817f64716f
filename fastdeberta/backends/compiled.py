"""How the backends of the compiled libraries call their operators, which have one signature."""

import torch
from torch import Tensor

from . import AttentionParams

# Offsets within a head's table and within a sequence are 32-bit.
LONGEST = 2**24


def _arguments(params: AttentionParams) -> tuple:
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
    )


def forward(
    library: str, inputs: tuple[Tensor | None, ...], params: AttentionParams, *extra
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T].

    Args:
        library: namespace of its operators.
        inputs: query, key, value, pos_key and pos_query as the kernels read them.
        extra: the library's own arguments.
    """
    operators = getattr(torch.ops, library)
    return operators.attention_forward(*inputs, *_arguments(params), *extra)


def backward(
    library: str,
    inputs: tuple[Tensor | None, ...],
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    *extra,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, pos_key and pos_query.

    Args:
        inputs: dout, query, key, value, pos_key and pos_query as the kernels read them.
        out, lse: what `forward` gave.
        library, extra: the same as there.
    """
    operators = getattr(torch.ops, library)
    *grads, dpos_key, dpos_query = operators.attention_backward(
        *inputs, out.contiguous(), lse.contiguous(), *_arguments(params), *extra
    )
    pos_key, pos_query = inputs[4:]
    return (
        *grads,
        None if pos_key is None else dpos_key,
        None if pos_query is None else dpos_query,
    )
