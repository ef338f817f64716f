"""The calls on which every backend is tested."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import definition
import pytest
import torch
from torch import Tensor

from fastdeberta import RelativePosition, disentangled_attention

LOG = RelativePosition(span=8, buckets=8, max_distance=16)
CLIPPED = RelativePosition(span=8, buckets=8, max_distance=16, clip_distance=True)
LINEAR = RelativePosition(span=16, buckets=None)
V1 = RelativePosition(span=512, buckets=None)
V3 = RelativePosition(span=256, buckets=256, max_distance=512)

NAMES = ("query", "key", "value", "pos_key", "pos_query")


@dataclass(frozen=True)
class Case:
    """One call.

    lengths: tokens of each sequence. Without mask or packing they are all the same.
    mask: how a padded batch shows its lengths: "right" or "left" padding; "holes" also masks
        every third token. Packed sequences know only "holes".
    width: length of the padded batch, if longer than its longest sequence.
    """

    id: str
    lengths: tuple[int, ...] = (65, 65)
    heads: int = 2
    head_dim: int = 32
    c2p: bool = True
    p2c: bool = True
    position: RelativePosition = LOG
    mask: str | None = None
    packed: bool = False
    causal: bool = False
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    padded_rows: str = "zeros"
    width: int = 0

    def __str__(self) -> str:
        return self.id

    @property
    def batch_length(self) -> int:
        return max(*self.lengths, self.width, 0)


_RAGGED = (127, 1, 63, 65)

CASES = (
    Case("one-token", (1,)),
    Case("two-tokens", (2, 2), head_dim=8),
    Case("length-63", (63, 63)),
    Case("length-65", (65, 65)),
    Case("length-127", (127,), heads=3),
    Case("length-200", (200,)),
    Case("c2c", c2p=False, p2c=False),
    Case("c2p", p2c=False),
    Case("p2c", c2p=False),
    Case("linear-shorter-than-span", (15, 15), position=LINEAR),
    Case("linear-longer-than-span", (127,), position=LINEAR),
    Case("v1", (65,), position=V1),
    Case("v3", (200,), position=V3),
    Case("v3-beyond-saturation", (700,), heads=1, head_dim=8, position=V3),
    Case("clipped", (65,), position=CLIPPED),
    Case("head-dim-8", (63,), head_dim=8),
    Case("head-dim-20", (63,), head_dim=20),
    Case("head-dim-64", (127,), head_dim=64),
    Case("head-dim-128", (33,), heads=1, head_dim=128),
    Case("scale", softmax_scale=0.3),
    Case("causal", causal=True),
    Case("causal-c2c", c2p=False, p2c=False, causal=True),
    Case("causal-right", _RAGGED, mask="right", causal=True),
    Case("causal-left-uniform", _RAGGED, mask="left", causal=True, padded_rows="uniform"),
    Case("right", _RAGGED, mask="right"),
    Case("right-uniform", _RAGGED, mask="right", padded_rows="uniform"),
    Case("left", _RAGGED, mask="left"),
    Case("left-uniform", _RAGGED, mask="left", padded_rows="uniform"),
    Case("holes", _RAGGED, mask="holes"),
    Case("holes-uniform", _RAGGED, mask="holes", padded_rows="uniform"),
    Case("holes-c2p", _RAGGED, mask="holes", p2c=False, position=LINEAR),
    Case("padded-sequence", (65, 0, 20), mask="right"),
    Case("padded-sequence-uniform", (65, 0, 20), mask="right", padded_rows="uniform"),
    Case("padded-c2c-uniform", (65, 0), mask="left", c2p=False, p2c=False, padded_rows="uniform"),
    Case("all-padded", (0, 0), width=5, mask="right"),
    Case("all-padded-uniform", (0, 0), width=5, mask="right", padded_rows="uniform"),
    Case("packed", _RAGGED, packed=True),
    Case("packed-one", (65,), packed=True),
    Case("packed-equal", (33, 33), packed=True),
    Case("packed-empty", (0, 63, 0, 65, 0), packed=True),
    Case("packed-p2c", _RAGGED, packed=True, c2p=False),
    Case("packed-causal", _RAGGED, packed=True, causal=True),
    Case("packed-holes", (0, *_RAGGED), packed=True, mask="holes"),
    Case("packed-uniform", (*_RAGGED, 0), packed=True, mask="holes", padded_rows="uniform"),
    Case("packed-linear", _RAGGED, packed=True, position=LINEAR),
    Case("dropout", dropout_p=0.1),
    Case("dropout-odd", (127,), heads=3, dropout_p=0.5, p2c=False),
    Case("dropout-uniform", (33, 0), mask="right", dropout_p=0.3, padded_rows="uniform"),
    Case("dropout-causal", (63,), dropout_p=0.3, causal=True),
    Case("dropout-packed", (0, 33, 17), packed=True, dropout_p=0.3),
)


@dataclass(frozen=True)
class Call:
    """A case's tensors, as the op takes them and as the definition does.

    tensors: query, key, value ([B, L, H, D] or [T, H, D]), pos_key, pos_query.
    dout: the gradient that comes back. options: keyword arguments of the op but `backend`.
    defined: keyword arguments of `definition.attention`.
    """

    tensors: tuple[Tensor | None, ...]
    dout: Tensor
    options: dict
    defined: dict


def seed_dropout(device: torch.device | str = "cpu") -> int:
    """Seeds torch, and returns the seed that the next call's dropout on `device` will draw."""
    torch.manual_seed(4321)
    seed = int(torch.randint(2**62, (1,), device=device))
    torch.manual_seed(4321)
    return seed


def make(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Call:
    """The tensors of a case; the same values on every device. Leaves torch seeded for dropout."""
    generator = torch.Generator().manual_seed(1234)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    lengths, length, batch = case.lengths, case.batch_length, len(case.lengths)
    tokens = (sum(lengths),) if case.packed else (batch, length)
    content = (*tokens, case.heads, case.head_dim)
    table = (2 * case.position.span, case.heads, case.head_dim)
    tensors = (
        *(normal(*content) for _ in range(3)),
        normal(*table) if case.c2p else None,
        normal(*table) if case.p2c else None,
    )
    key_mask = _key_mask(case)
    options = {
        "relative_position": case.position if case.c2p or case.p2c else None,
        "key_mask": None if key_mask is None else key_mask.to(device),
        "causal": case.causal,
        "dropout_p": case.dropout_p,
        "softmax_scale": case.softmax_scale,
        "padded_rows": case.padded_rows,
    }
    starts = list(accumulate(lengths if case.packed else [length] * batch, initial=0))
    if case.packed:
        options["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32, device=device)
        options["max_seqlen"] = length
    keep = None
    if case.dropout_p:
        seed = seed_dropout(device)
        keep = definition.keep_mask(seed, 0, batch, case.heads, length, case.dropout_p).to(device)
    defined = {
        "bounds": list(zip(starts, starts[1:], strict=False)),
        "rule": case.position,
        "attend": None if key_mask is None else key_mask.flatten().to(device),
        "keep": keep,
        "causal": case.causal,
        "dropout_p": case.dropout_p,
        "softmax_scale": case.softmax_scale,
        "uniform": case.padded_rows == "uniform" and key_mask is not None,
    }
    return Call(tensors, normal(*content), options, defined)


def _key_mask(case: Case) -> Tensor | None:
    if case.mask is None:
        assert case.packed or len(set(case.lengths)) == 1, "lengths differ: say how they are padded"
        return None
    if case.packed:
        assert case.mask == "holes"
        return torch.arange(sum(case.lengths)) % 3 != 1
    position, lengths = torch.arange(case.batch_length), torch.tensor(case.lengths)[:, None]
    if case.mask == "left":
        return position >= case.batch_length - lengths
    real = position < lengths
    return real & (position % 3 != 1) if case.mask == "holes" else real


def named(out: Tensor, lse: Tensor, grads) -> dict[str, Tensor]:
    """What a forward and a backward pass give, packed, under the names that failures report."""
    results = {"out": out, "lse": lse}
    results |= {f"d{n}": g for n, g in zip(NAMES, grads, strict=True) if g is not None}
    return results


def by_definition(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """out [T, H, D], lse [H, T] and gradients by the definition, computed in `dtype`."""
    query = call.tensors[0]
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in call.tensors]
    packed = [x.reshape(-1, *query.shape[-2:]) for x in inputs[:3]]
    out, lse = definition.attention(*packed, *inputs[3:], **call.defined)
    out.backward(call.dout.to(dtype).reshape(out.shape))
    return named(out, lse, _packed_grads(inputs))


def _packed_grads(inputs) -> list[Tensor | None]:
    """Gradients, those of query, key and value as [T, H, D]; zero where nothing came back."""
    grads = [
        None if x is None else torch.zeros_like(x) if x.grad is None else x.grad for x in inputs
    ]
    return [g.reshape(-1, *g.shape[-2:]) for g in grads[:3]] + grads[3:]


def by_op(op, call: Call, backend: str) -> dict[str, Tensor]:
    """The same by `op`, which is `fastdeberta.disentangled_attention` or wraps it."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in call.tensors]
    out, lse = op(*inputs, **call.options, return_lse=True, backend=backend)
    assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype
    out.backward(call.dout)
    for x in inputs:
        assert x is None or (x.grad.shape == x.shape and x.grad.dtype == x.dtype)
    if lse.dim() == 3:
        lse = lse.transpose(0, 1).flatten(1)
    return named(out.flatten(0, -3), lse, _packed_grads(inputs))


@lru_cache(maxsize=256)
def truth_and_peer(
    case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The definition on the same inputs in float64, and in `dtype`."""
    call = make(case, dtype, device)
    return by_definition(call, torch.float64), by_definition(call, dtype)


def attend(*args, **kwargs):
    """The op; a call that its backend refuses skips with the reason."""
    try:
        return disentangled_attention(*args, **kwargs)
    except ValueError as error:
        if "cannot take this call" in str(error):
            pytest.skip(str(error))
        raise


def random_call(length=6, batch=2, dtype=torch.float32, device="cpu", dim=4, requires_grad=False):
    """Small query, key, value, pos_key, pos_query with two heads."""
    content, table = (batch, length, 2, dim), (2 * LOG.span, 2, dim)
    shapes = (content, content, content, table, table)
    return tuple(
        torch.randn(s, dtype=dtype, device=device).requires_grad_(requires_grad) for s in shapes
    )
