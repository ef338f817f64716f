"""disentangled_attention(): the only validation, the schema, the fakes and the autograd binding.

The way down: this function validates and flattens to packed [T, H, D]; Attention is the one
autograd.Function; fastdeberta::forward and fastdeberta::backward are the one schema, with the
backend's name as last argument; the backend does the work.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import AttentionParams
from .relative_position import RelativePosition

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PARAMS = (
    "Tensor? cu_seqlens, Tensor? key_mask, Tensor? rng_state, SymInt max_seqlen, "
    "int[]? position_rule, bool causal, float dropout_p, float softmax_scale, "
    "bool uniform_padding, str backend"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? pos_key, Tensor? pos_query"
torch.library.define("fastdeberta::forward", f"({_INPUTS}, {_PARAMS}) -> (Tensor, Tensor)")
torch.library.define(
    "fastdeberta::backward",
    f"(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, {_PARAMS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _params(
    query: Tensor,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen: int,
    position_rule: list[int] | None,
    causal: bool,
    dropout_p: float,
    softmax_scale: float,
    uniform_padding: bool,
) -> AttentionParams:
    rows = None
    if position_rule is not None:
        rows = RelativePosition.from_ints(position_rule).table(query.device)
    return AttentionParams(
        cu_seqlens,
        key_mask,
        rows,
        rng_state,
        max_seqlen,
        causal,
        dropout_p,
        softmax_scale,
        uniform_padding,
    )


def _run(function: Callable, device: torch.device, *args):
    """Without gradients or autocast: inputs already have the dtype to be computed in."""
    # Entering a context takes longer than asking whether it is needed.
    if torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return function(*args)
    return function(*args)


@torch.library.impl("fastdeberta::forward", "CompositeExplicitAutograd")
def _forward(query, key, value, pos_key, pos_query, *params_and_backend):
    *values, backend = params_and_backend
    forward = backends.load(backend).forward
    params = _params(query, *values)
    return _run(forward, query.device, query, key, value, pos_key, pos_query, params)


@torch.library.impl("fastdeberta::backward", "CompositeExplicitAutograd")
def _backward(dout, query, key, value, pos_key, pos_query, out, lse, *params_and_backend):
    *values, backend = params_and_backend
    backward = backends.load(backend).backward
    params = _params(query, *values)
    inputs = (dout, query, key, value, pos_key, pos_query, out, lse)
    grads = _run(backward, query.device, *inputs, params)
    # A schema cannot return "Tensor?": an absent table's gradient travels as an empty tensor.
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("fastdeberta::forward")
def _forward_fake(query, key, value, pos_key, pos_query, *params):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((query.size(1), query.size(0)), dtype=dtype)


@torch.library.register_fake("fastdeberta::backward")
def _backward_fake(dout, query, key, value, pos_key, pos_query, out, lse, *params):
    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return query.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return tuple(like(x) for x in (query, key, value, pos_key, pos_query))


class Attention(torch.autograd.Function):
    """Binds the two operators. Two operators under a Function cost a third of what
    register_autograd costs a call."""

    @staticmethod
    def forward(ctx, query, key, value, pos_key, pos_query, *params):
        out, lse = torch.ops.fastdeberta.forward(query, key, value, pos_key, pos_query, *params)
        cu_seqlens, key_mask, rng_state, *rest = params
        ctx.save_for_backward(
            query, key, value, pos_key, pos_query, out, lse, cu_seqlens, key_mask, rng_state
        )
        ctx.rest = rest
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, _):
        *inputs, out, lse, cu_seqlens, key_mask, rng_state = ctx.saved_tensors
        *grads, dpos_key, dpos_query = torch.ops.fastdeberta.backward(
            dout, *inputs, out, lse, cu_seqlens, key_mask, rng_state, *ctx.rest
        )
        pos_key, pos_query = inputs[3:]
        return (
            *grads,
            None if pos_key is None else dpos_key,
            None if pos_query is None else dpos_query,
            *(None,) * (3 + len(ctx.rest)),
        )


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    *,
    relative_position: RelativePosition | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    padded_rows: str = "zeros",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Disentangled attention: content-to-content, content-to-position and position-to-content.

    score(i, j) = (q_i·k_j + q_i·pos_key[r] + k_j·pos_query[r]) * softmax_scale,  r = row(i - j)

    Args:
        query, key, value: [B, L, H, D]; or packed [T, H, D] with `cu_seqlens`. float16, bfloat16,
            float32 or float64, one dtype and device for all; any strides.
        pos_key: [2 * span, H, D], the projected table of the c2p term; None leaves the term out.
        pos_query: [2 * span, H, D], the projected table of the p2c term; None leaves it out.
        relative_position: the rule distance -> row; required with pos_key or pos_query.
        key_mask: [B, L], or [T] with `cu_seqlens`; bool or integer, nonzero = attend. Any pattern.
        cu_seqlens: int32 [B + 1]: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        max_seqlen: longest sequence in `cu_seqlens`; found by reading them when None, which waits
            for the device and cannot be compiled.
        causal: attend to positions j <= i only.
        dropout_p: probability of dropping an attention probability. The mask is drawn from torch's
            generator of the device, and is the same on every backend for the same draw.
        softmax_scale: None means 1 / sqrt(D * (1 + number of position terms)).
        padded_rows: what a masked token's own row becomes: "zeros", or "uniform", the average of
            all values of its sequence, as transformers' modules give.
        return_lse: return (out, lse).
        backend: "auto", or a name in `available_backends()`, which is used or raises.

    Returns:
        out, of query's shape and dtype; and, on request, lse, the row-wise natural log-sum-exp of
        the scores: float32 (float64 for float64 inputs), [B, H, L] or [H, T], -inf for rows
        without a key, not differentiable.

    Raises:
        ValueError, TypeError: an argument that does not fit; the message names it.

    Under autocast every floating argument is cast to autocast's dtype first.

    Source: DeBERTa, section 3.1, eq. 4; without position tables, ordinary attention (ELECTRA).
    """
    call = _prepare(
        query,
        key,
        value,
        pos_key,
        pos_query,
        relative_position,
        key_mask,
        cu_seqlens,
        max_seqlen,
        causal,
        dropout_p,
        softmax_scale,
        padded_rows,
    )
    name, _ = backends.choose(backend, call.tensors[0], call.params)
    p = call.params
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in call.tensors
    )
    attend = Attention.apply if needs_grad else torch.ops.fastdeberta.forward
    out, lse = attend(
        *call.tensors,
        p.cu_seqlens,
        p.key_mask,
        p.rng_state,
        p.max_seqlen,
        call.position_rule,
        p.causal,
        p.dropout_p,
        p.softmax_scale,
        p.uniform_padding,
        name,
    )
    out = out.view(query.shape)
    if not return_lse:
        return out
    if cu_seqlens is None:
        batch, length, heads, _ = query.shape
        lse = lse.view(heads, batch, length).transpose(0, 1)
    return out, lse


@dataclass(frozen=True)
class Explanation:
    """Which backend "auto" takes for a call, and why it passed others over."""

    backend: str
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"auto takes {self.backend!r}"]
        lines += [f"  not {name!r}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Which backend `disentangled_attention` takes for these arguments with "auto", and why.

    Arguments and errors are those of `disentangled_attention`, of which `return_lse` and
    `backend` play no part; nothing is computed.
    """
    call = inspect.signature(disentangled_attention).bind(*args, **kwargs)
    call.apply_defaults()
    arguments = {k: v for k, v in call.arguments.items() if k not in ("return_lse", "backend")}
    prepared = _prepare(**arguments)
    return Explanation(*backends.choose("auto", prepared.tensors[0], prepared.params))


@dataclass(frozen=True)
class _Call:
    tensors: tuple[Any, ...]  # query, key, value [T, H, D]; pos_key, pos_query, or None
    params: AttentionParams
    position_rule: list[int] | None


def _prepare(
    query,
    key,
    value,
    pos_key,
    pos_query,
    relative_position,
    key_mask,
    cu_seqlens,
    max_seqlen,
    causal,
    dropout_p,
    softmax_scale,
    padded_rows,
) -> _Call:
    """Validates, applies autocast and defaults, and flattens to packed [T, H, D]."""
    tensors: tuple[Any, ...] = (query, key, value, pos_key, pos_query)
    _check_types(tensors)
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = tuple(None if x is None else x.to(dtype) for x in tensors)
        query, key, value, pos_key, pos_query = tensors
    _check_tensors(tensors, cu_seqlens is not None)
    _check_positions(query, pos_key, pos_query, relative_position)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if padded_rows not in ("zeros", "uniform"):
        raise ValueError(f"padded_rows must be 'zeros' or 'uniform', got {padded_rows!r}")

    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen belongs to packed input: give cu_seqlens too")
        max_seqlen = query.size(1)
    else:
        max_seqlen = _check_cu_seqlens(cu_seqlens, max_seqlen, query)
    if key_mask is not None:
        _check_key_mask(key_mask, query)
        key_mask = key_mask.reshape(-1).bool()

    if softmax_scale is None:
        terms = 1 + (pos_key is not None) + (pos_query is not None)
        softmax_scale = (query.size(-1) * terms) ** -0.5
    rng_state = None
    if dropout_p > 0.0:
        # A tensor, so that compiled and captured graphs draw anew at every run.
        seed = torch.randint(2**62, (1,), device=query.device)
        rng_state = torch.cat([seed, torch.zeros_like(seed)])

    params = AttentionParams(
        cu_seqlens,
        key_mask,
        None,
        rng_state,
        max_seqlen,
        causal,
        dropout_p,
        softmax_scale,
        padded_rows == "uniform" and key_mask is not None,
    )
    packed = tuple(x.reshape(-1, *query.shape[-2:]) for x in (query, key, value))
    rule = None
    if relative_position is not None and (pos_key is not None or pos_query is not None):
        rule = relative_position.ints
    return _Call((*packed, pos_key, pos_query), params, rule)


def _check_types(tensors) -> None:
    names = ("query", "key", "value", "pos_key", "pos_query")
    for name, x in zip(names, tensors, strict=True):
        if x is None and name.startswith("pos"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_tensors(tensors, packed: bool) -> None:
    query, key, value, pos_key, pos_query = tensors
    layout = "[T, H, D] with cu_seqlens" if packed else "[B, L, H, D]"
    if query.dim() != (3 if packed else 4):
        raise ValueError(f"query must be {layout}, got shape {tuple(query.shape)}")
    if query.dtype not in _DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise TypeError(f"query must be {allowed}; got {query.dtype}")
    named = {"key": key, "value": value, "pos_key": pos_key, "pos_query": pos_query}
    for name, x in named.items():
        if x is None:
            continue
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {x.device}")
    for name, x in (("key", key), ("value", value)):
        if x.shape != query.shape:
            raise ValueError(
                f"{name} must have query's shape {tuple(query.shape)}, got {tuple(x.shape)}"
            )


def _check_positions(query, pos_key, pos_query, relative_position) -> None:
    if pos_key is None and pos_query is None:
        return
    if not isinstance(relative_position, RelativePosition):
        raise TypeError(
            "relative_position must be a RelativePosition when pos_key or pos_query is given, "
            f"got {type(relative_position).__name__}"
        )
    expected = (2 * relative_position.span, *query.shape[-2:])
    for name, x in (("pos_key", pos_key), ("pos_query", pos_query)):
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(
                f"{name} must be [2 * span, H, D] = {list(expected)}, got {list(x.shape)}"
            )


def _check_cu_seqlens(cu_seqlens, max_seqlen, query) -> int:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) < 2:
        raise ValueError(f"cu_seqlens must be [B + 1], B >= 1; got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(
            f"cu_seqlens must be on query's device {query.device}, got {cu_seqlens.device}"
        )
    if torch.compiler.is_compiling():
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given with cu_seqlens in compiled code")
        return max_seqlen
    if cu_seqlens.device.type != "cpu" and max_seqlen is not None:
        return max_seqlen  # Reading the values would wait for the device.
    lengths = cu_seqlens.diff()
    if lengths.min() < 0:
        raise ValueError(f"cu_seqlens must ascend, got {cu_seqlens.tolist()}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != query.size(0):
        raise ValueError(
            f"cu_seqlens must run from 0 to T = {query.size(0)}, "
            f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    longest = int(lengths.max())
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}; got {max_seqlen}"
        )
    return longest if max_seqlen is None else max_seqlen


def _check_key_mask(key_mask, query) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.is_floating_point():
        got = getattr(key_mask, "dtype", type(key_mask).__name__)
        raise TypeError(f"key_mask must be a bool or integer tensor, got {got}")
    expected = query.shape[:-2]
    if key_mask.shape != expected:
        name = "[B, L]" if len(expected) == 2 else "[T]"
        raise ValueError(f"key_mask must be {name} = {list(expected)}, got {list(key_mask.shape)}")
    if key_mask.device != query.device:
        raise ValueError(
            f"key_mask must be on query's device {query.device}, got {key_mask.device}"
        )
