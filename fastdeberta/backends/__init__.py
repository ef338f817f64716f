"""The registry of backends: name -> module, and the choice between them.

A backend is one module with four functions:

    unavailable() -> str | None                  why it cannot be used here at all; None: it can
    unsupported(query, params) -> str | None     why it cannot take this call; None: it can
    forward(query, key, value, pos_key, pos_query, params) -> (out, lse)
    backward(dout, query, key, value, pos_key, pos_query, out, lse, params)
        -> (dquery, dkey, dvalue, dpos_key, dpos_query)

and perhaps a fifth, for calls that it can take and another backend had better take:

    yields(query, params) -> str | None          why; None: it need not

query, key, value, out: packed [T, H, D]. pos_key, pos_query: [2 * span, H, D] or None (then the
gradient is None too). lse: [H, T], float32 (float64 for float64 inputs), natural logarithm.
Backends never import one another.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from ..relative_position import RowTable

# Modules import what they optionally need (triton, a compiled library) when it is asked for.
MODULES = {
    "cpu": "fastdeberta.backends.cpu",
    "cuda": "fastdeberta.backends.cuda",
    "triton": "fastdeberta.backends.triton",
    "reference": "fastdeberta.backends.reference",
}

# "auto" takes the first of these that can do the call and does not yield it to a later one.
PREFERENCE = ("cpu", "cuda", "triton", "reference")


class AttentionParams(NamedTuple):
    """All of one call but its differentiable tensors.

    cu_seqlens: int32 [B + 1], where each sequence starts; None: every sequence is max_seqlen long.
    key_mask: bool [T], True = attend; None: attend to all.
    rows: distance -> row of pos_key and pos_query; None: neither is given.
    rng_state: int64 [2], seed and offset of dropout's generator; None: no dropout.
    uniform_padding: masked query rows average all values of their sequence, instead of being zero.
    """

    cu_seqlens: Tensor | None
    key_mask: Tensor | None
    rows: RowTable | None
    rng_state: Tensor | None
    max_seqlen: int
    causal: bool
    dropout_p: float
    softmax_scale: float
    uniform_padding: bool


def load(name: str) -> ModuleType:
    """The module of a backend."""
    return sys.modules[MODULES[name]]


def available_backends() -> dict[str, str | None]:
    """Every backend with the reason why it cannot be used on this machine; None = usable."""
    return {name: load(name).unavailable() for name in MODULES}


def choose(backend: str, query: Tensor, params: AttentionParams) -> tuple[str, dict[str, str]]:
    """Resolves a backend's name for one call.

    An explicit name is taken or refused, never replaced; "auto" takes the first that can.

    Returns:
        The name, and the reasons for which "auto" passed others over.

    Raises:
        ValueError: unknown name, or the named backend cannot take this call.
    """
    if backend != "auto":
        if backend not in MODULES:
            known = ", ".join(["auto", *MODULES])
            raise ValueError(f"backend must be one of {known}; got {backend!r}")
        if reason := _refusal(backend, query, params):
            raise ValueError(f"backend {backend!r} cannot take this call: {reason}")
        return backend, {}
    passed_over: dict[str, str] = {}
    able = []
    for name in PREFERENCE:
        reason = _refusal(name, query, params)
        if reason is None:
            able.append(name)
        else:
            passed_over[name] = reason
    if not able:
        raise ValueError(f"no backend can take this call: {passed_over}")
    for name in able[:-1]:
        reason = _yields(name, query, params)
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    return able[-1], passed_over


def _refusal(name: str, query: Tensor, params: AttentionParams) -> str | None:
    return _unavailable(name) or load(name).unsupported(query, params)


def _yields(name: str, query: Tensor, params: AttentionParams) -> str | None:
    yields = getattr(load(name), "yields", None)
    return yields and yields(query, params)


def constant(function: Callable) -> Callable:
    """A function whose result torch.compile takes instead of tracing it.

    What torch.compiler.assume_constant_result does, which imports the compiler first: more than a
    second at every start, and triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _unavailable(name: str) -> str | None:
    return load(name).unavailable()


# Last, for they import from here. torch.compile traces a look-up in sys.modules, but no import.
for _module in MODULES.values():
    import_module(_module)
