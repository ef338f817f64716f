"""The CUDA kernels run by csrc/simt: every call that they take, in several orders of threads."""

from dataclasses import replace

import pytest
import simulated
import torch
from cases import CASES, LINEAR, LOG, V1, V3, Case, by_op, make, truth_and_peer
from closeness import assert_close

from fastdeberta import backends, disentangled_attention
from fastdeberta.backends import cuda
from fastdeberta.dropout import keep_mask

pytestmark = pytest.mark.simulated

HEAD_DIMS = (32, 64, 96, 128)
DTYPES = (torch.float16, torch.bfloat16)
ORDERS = ("forward", "reverse", "random:7")
by_id = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    if reason := simulated.unavailable():
        pytest.skip(reason)
    monkeypatch.setitem(backends.MODULES, "simt", "simulated")


def check(case: Case, dtype: torch.dtype) -> None:
    ours = by_op(disentangled_attention, make(case, dtype), "simt")
    truth, peer = truth_and_peer(case, dtype, "cpu")
    assert_close(ours, peer, truth, dtype)


def taken(case: Case) -> Case:
    """The case, with a head dim that the kernels take."""
    return case if case.head_dim in HEAD_DIMS else replace(case, head_dim=32)


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [taken(case) for case in CASES], ids=str)
def test_definition(case, dtype, order, monkeypatch):
    monkeypatch.setenv("FASTDEBERTA_SIMT_ORDER", order)
    check(case, dtype)


# Each makes what no case above has: far tiles on both sides of wide heads, several sequences on one
# diagonal, dropout in far tiles, tables of one row, more rows than distances.
SHAPES = (
    Case("far", (300,), heads=1, position=LOG),
    Case("far-causal", (300,), heads=1, position=LOG, causal=True),
    Case("far-dropout", (200, 200), heads=1, position=LINEAR, dropout_p=0.2),
    Case("far-packed", (200, 3, 150), packed=True, position=LINEAR),
    Case("far-c2p", (260,), heads=1, p2c=False, position=LINEAR),
    Case("far-p2c", (260,), heads=1, c2p=False, position=LINEAR),
    Case("far-holes-uniform", (260, 100), mask="holes", padded_rows="uniform"),
    Case("far-dropout-uniform", (200, 70), mask="left", padded_rows="uniform", dropout_p=0.2),
    Case("near", (140, 140), heads=3, position=V3),
    Case("near-linear", (140,), heads=1, position=V1),
    Case("one-row", (130,), heads=1, position=replace(LINEAR, span=1)),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_head_dim(case, head_dim, dtype):
    check(replace(case, head_dim=head_dim), dtype)


def test_an_off_by_one_row_is_seen():
    case = by_id["length-65"]
    call = make(taken(case), torch.float16)
    query, key, value, pos_key, pos_query = call.tensors
    shifted = replace(call, tensors=(query, key, value, pos_key.roll(1, 0), pos_query))
    ours = by_op(disentangled_attention, shifted, "simt")
    truth, peer = truth_and_peer(taken(case), torch.float16, "cpu")
    with pytest.raises(AssertionError, match="out"):
        assert_close(ours, peer, truth, torch.float16)


def test_two_runs_are_equal_bit_by_bit(monkeypatch):
    case = replace(by_id["holes"], head_dim=64, dropout_p=0.1)
    first, second = (
        by_op(disentangled_attention, make(case, torch.bfloat16), "simt") for _ in range(2)
    )
    monkeypatch.setenv("FASTDEBERTA_SIMT_ORDER", "random:3")
    third = by_op(disentangled_attention, make(case, torch.bfloat16), "simt")
    for result in first:
        assert torch.equal(first[result], second[result])
        assert torch.equal(first[result], third[result]), "no sum depends on the order of threads"


def test_dropout_keeps_what_the_rule_keeps():
    """Without positions and with equal scores, out shows the mask itself."""
    length, dropout_p = 70, 0.3
    zeros = torch.zeros(1, length, 1, 96, dtype=torch.float16)
    value = torch.zeros_like(zeros)
    value[0, :, 0, :length] = torch.eye(length)
    torch.manual_seed(5)
    out = disentangled_attention(zeros, zeros, value, dropout_p=dropout_p, backend="simt")
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    state = torch.tensor([int(seed), 0])
    keep = keep_mask(state, 1, 1, length, length, dropout_p)[0, 0]
    assert torch.equal(out[0, :, 0, :length] != 0, keep)


def test_rows_that_are_not_aligned_are_copied():
    tensors = [torch.randn(2, 30, 2, 33).half()[..., 1:] for _ in range(3)]
    tensors += [torch.randn(2 * LOG.span, 2, 33).half()[..., 1:] for _ in range(2)]
    assert any(x.data_ptr() % 16 for x in tensors)
    out = disentangled_attention(*tensors, relative_position=LOG, backend="simt")
    copies = [x.contiguous() for x in tensors]
    assert torch.equal(out, disentangled_attention(*copies, relative_position=LOG, backend="simt"))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float32, 64, "it takes float16 and bfloat16, not torch.float32"),
        (torch.float16, 48, "it takes head dims 32, 64, 96, 128, not 48"),
    ],
)
def test_refusals(dtype, head_dim, reason):
    tensors = [torch.randn(1, 5, 1, head_dim, dtype=dtype) for _ in range(3)]
    with pytest.raises(ValueError, match=reason):
        disentangled_attention(*tensors, backend="simt")


def test_auto_yields_long_sequences_where_others_are_faster(monkeypatch):
    monkeypatch.setattr(cuda, "_major", lambda device: 9)
    query = torch.empty(1, 1, 64, dtype=torch.float16)
    params = {"cu_seqlens": None, "key_mask": None, "rows": None, "rng_state": None}
    params |= {"causal": False, "dropout_p": 0.0, "softmax_scale": 1.0, "uniform_padding": False}
    short, long = (backends.AttentionParams(max_seqlen=n, **params) for n in (512, 4096))
    assert cuda.yields(query, short) is None
    assert "1024 tokens" in cuda.yields(query, long)
    monkeypatch.setattr(cuda, "_major", lambda device: 8)
    assert cuda.yields(query, long) is None
