"""The compiled CUDA C++ kernels (csrc/cuda): float16 and bfloat16, head dims 32, 64, 96 and 128.

Position scores stay on chip: by count, a forward pass moves its tensors and its tables through the
GPU's memory and nothing else. For NVIDIA GPUs from sm_80 on. Tests run the kernels on the CPU
(csrc/simt) and compile them for sm_80 and sm_90; no GPU has run them yet.
"""

import torch
from torch import Tensor

from .. import libraries
from . import AttentionParams, compiled, constant

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (32, 64, 96, 128)
_LIBRARY = "fastdeberta_C_cuda"

# Of longer sequences most tiles are far from the diagonal, and cost what plain attention does. For
# that Triton's compiler uses instructions of sm_90 and later that these kernels do not.
_SHORT = 1024


def unavailable() -> str | None:
    if reason := libraries.load("_C_cuda"):
        return reason
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def unsupported(query: Tensor, params: AttentionParams) -> str | None:
    if query.device.type != "cuda":
        return f"it takes tensors on cuda, not on {query.device}"
    return refusal(query, params) or _too_small(
        query.device.index, query.size(-1), params.rows is not None
    )


def refusal(query: Tensor, params: AttentionParams) -> str | None:
    """Why the kernels cannot take this call, whatever the device."""
    if query.dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, not {query.dtype}"
    if query.size(-1) not in _HEAD_DIMS:
        return f"it takes head dims {', '.join(map(str, _HEAD_DIMS))}, not {query.size(-1)}"
    if params.max_seqlen > compiled.LONGEST:
        return f"it takes sequences of at most {compiled.LONGEST} tokens, not {params.max_seqlen}"
    return None


def yields(query: Tensor, params: AttentionParams) -> str | None:
    if params.max_seqlen > _SHORT and _major(query.device.index) >= 9:
        return (
            f"beyond {_SHORT} tokens most tiles are far, and others use the newer tensor-core "
            f"instructions of this GPU"
        )
    return None


@constant
def _major(device: int) -> int:
    return torch.cuda.get_device_properties(device).major


@constant
def _too_small(device: int, head_dim: int, positions: bool) -> str | None:
    """Why no kernel for this head dim runs on a device."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"it needs sm_80 or newer, not sm_{properties.major}{properties.minor}"
    has = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    library = getattr(torch.ops, _LIBRARY)
    needs = max(library.shared_memory(head_dim, positions, backward) for backward in (False, True))
    if needs > has:
        return f"head dim {head_dim} needs {needs} bytes of shared memory, and a block has {has}"
    return None


def aligned(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors with every row on a 16-byte boundary, as the kernels copy them."""

    def is_aligned(x: Tensor) -> bool:
        return (
            x.stride(2) == 1
            and x.data_ptr() % 16 == 0
            and all(x.stride(n) % 8 == 0 for n in range(2))
        )

    return tuple(
        x if x is None or is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
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
    inputs = aligned(query, key, value, pos_key, pos_query)
    return compiled.forward(_LIBRARY, inputs, params)


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
    inputs = aligned(dout, query, key, value, pos_key, pos_query)
    return compiled.backward(_LIBRARY, inputs, out, lse, params)
