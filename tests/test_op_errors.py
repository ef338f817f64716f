"""Every message of the op's validation, once: it names the argument and what was given."""

import pytest
import torch
from cases import LOG, random_call

from fastdeberta import RelativePosition, backends, disentangled_attention, explain

MASK = torch.ones(2, 6, dtype=torch.bool)
CU = torch.tensor([0, 4, 12], dtype=torch.int32)
NAMES = ("query", "key", "value", "pos_key", "pos_query")


def call(padded=True, **changes):
    """A valid call with some arguments changed; a callable changes the argument it stands for."""
    arguments = dict(zip(NAMES, random_call(), strict=True)) | {"relative_position": LOG}
    if not padded:
        for name in NAMES[:3]:
            arguments[name] = arguments[name].flatten(0, 1)
        arguments["cu_seqlens"] = CU
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def half(x):
    return x.half()


def meta(x):
    return x.to("meta")


ERRORS = [
    (call(query=None), TypeError, "query must be a tensor, got NoneType"),
    (call(value=[1.0]), TypeError, "value must be a tensor, got list"),
    (call(pos_key=1.0), TypeError, "pos_key must be a tensor, got float"),
    (
        call(query=lambda x: x[0]),
        ValueError,
        r"query must be \[B, L, H, D\], got shape \(6, 2, 4\)",
    ),
    (
        call(padded=False, query=lambda x: x[None]),
        ValueError,
        r"query must be \[T, H, D\] with cu_seqlens, got shape \(1, 12, 2, 4\)",
    ),
    (call(query=lambda x: x.long()), TypeError, "query must be float16, .*; got torch.int64"),
    (call(key=half), TypeError, "key must have query's dtype torch.float32, got torch.float16"),
    (call(value=half), TypeError, "value must have query's dtype"),
    (call(pos_key=half), TypeError, "pos_key must have query's dtype"),
    (call(pos_query=half), TypeError, "pos_query must have query's dtype"),
    (call(key=meta), ValueError, "key must be on query's device cpu, got meta"),
    (call(pos_query=meta), ValueError, "pos_query must be on query's device cpu, got meta"),
    (
        call(key=lambda x: x[:, :5]),
        ValueError,
        r"key must have query's shape \(2, 6, 2, 4\), got \(2, 5, 2, 4\)",
    ),
    (call(value=lambda x: x[..., :3]), ValueError, "value must have query's shape"),
    (
        call(relative_position=None),
        TypeError,
        "relative_position must be a RelativePosition when .* got NoneType",
    ),
    (
        call(relative_position=None, pos_key=None),
        TypeError,
        "relative_position must be a RelativePosition",
    ),
    (call(relative_position=8), TypeError, "relative_position must be .* got int"),
    (
        call(pos_key=lambda x: x[:-1]),
        ValueError,
        r"pos_key must be \[2 \* span, H, D\] = \[16, 2, 4\], got \[15, 2, 4\]",
    ),
    (call(pos_query=lambda x: x[:, :1]), ValueError, r"pos_query must be .* got \[16, 1, 4\]"),
    (
        call(relative_position=RelativePosition(4, 4, 16)),
        ValueError,
        r"pos_key must be .* = \[8, 2, 4\], got \[16, 2, 4\]",
    ),
    (call(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (call(dropout_p=-0.1), ValueError, "dropout_p must be"),
    (call(dropout_p=float("nan")), ValueError, "dropout_p must be"),
    (call(padded_rows="mean"), ValueError, "padded_rows must be 'zeros' or 'uniform', got 'mean'"),
    (call(max_seqlen=6), ValueError, "max_seqlen belongs to packed input: give cu_seqlens too"),
    (
        call(padded=False, max_seqlen=7),
        ValueError,
        "max_seqlen must be at least the longest sequence, 8; got 7",
    ),
    (
        call(padded=False, cu_seqlens=CU.long()),
        TypeError,
        "cu_seqlens must be an int32 tensor, got torch.int64",
    ),
    (call(padded=False, cu_seqlens=[0, 12]), TypeError, "cu_seqlens must be .* got list"),
    (call(padded=False, cu_seqlens=CU[:1]), ValueError, r"cu_seqlens must be \[B \+ 1\].*\(1,\)"),
    (call(padded=False, cu_seqlens=CU[None]), ValueError, r"cu_seqlens must be .*\(1, 3\)"),
    (
        call(padded=False, cu_seqlens=CU.to("meta")),
        ValueError,
        "cu_seqlens must be on query's device cpu, got meta",
    ),
    (
        call(padded=False, cu_seqlens=CU[[0, 2, 1, 2]]),
        ValueError,
        r"cu_seqlens must ascend, got \[0, 12, 4, 12\]",
    ),
    (
        call(padded=False, cu_seqlens=CU - 1),
        ValueError,
        "cu_seqlens must run from 0 to T = 12, got -1 to 11",
    ),
    (
        call(padded=False, cu_seqlens=CU[:2]),
        ValueError,
        "cu_seqlens must run from 0 to T = 12, got 0 to 4",
    ),
    (
        call(key_mask=MASK.float()),
        TypeError,
        "key_mask must be a bool or integer tensor, got torch.float32",
    ),
    (call(key_mask=[1]), TypeError, "key_mask must be .* got list"),
    (
        call(key_mask=MASK[:, :5]),
        ValueError,
        r"key_mask must be \[B, L\] = \[2, 6\], got \[2, 5\]",
    ),
    (
        call(padded=False, key_mask=MASK),
        ValueError,
        r"key_mask must be \[T\] = \[12\], got \[2, 6\]",
    ),
    (call(key_mask=MASK.to("meta")), ValueError, "key_mask must be on query's device cpu"),
]


@pytest.mark.parametrize("function", [disentangled_attention, explain])
@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_argument(arguments, error, message, function):
    with pytest.raises(error, match=message):
        function(**arguments)


def test_unknown_backend():
    known = ", ".join(["auto", *backends.MODULES])
    with pytest.raises(ValueError, match=f"backend must be one of {known}; got 'cudnn'"):
        disentangled_attention(**call(), backend="cudnn")


def test_valid_calls_pass():
    disentangled_attention(**call())
    disentangled_attention(**call(padded=False, max_seqlen=8))
