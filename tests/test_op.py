from functools import partial

import cases
import pytest
import torch
from cases import CASES, LOG, Case, attend, by_op, make, random_call, truth_and_peer
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastdeberta import disentangled_attention

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
by_id = {case.id: case for case in CASES}


def grads_of(function, inputs):
    """Output and gradients of a function of fresh leaves, for a fixed incoming gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    out.backward(weights.view(out.shape))
    return out.detach(), [x.grad for x in leaves]


# The definition


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case, dtype, backend, device):
    call = make(case, dtype, device)
    ours = by_op(attend, call, backend)
    truth, peer = truth_and_peer(case, dtype, device)
    assert_close(ours, peer, truth, dtype)


def test_backend_takes_the_common_call(backend, device):
    for dtype in (torch.float32, torch.bfloat16)[backend == "cuda" :]:
        inputs = random_call(65, dtype=dtype, device=device, dim=64)
        mask = torch.ones(2, 65, dtype=torch.bool, device=device)
        disentangled_attention(
            *inputs, relative_position=LOG, key_mask=mask, dropout_p=0.1, backend=backend
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    mask=st.sampled_from(["right", "left", "holes"]),
    position=st.sampled_from([LOG, cases.CLIPPED, cases.LINEAR]),
    head_dim=st.integers(1, 24),
    terms=st.tuples(st.booleans(), st.booleans()),
    packed=st.booleans(),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.4]),
    padded_rows=st.sampled_from(["zeros", "uniform"]),
)
def test_any_call_on_the_reference(lengths, mask, position, head_dim, terms, packed, **options):
    case = Case(
        "any",
        tuple(lengths),
        mask="holes" if packed else mask,
        position=position,
        head_dim=head_dim,
        c2p=terms[0],
        p2c=terms[1],
        packed=packed,
        **options,
    )
    ours = by_op(disentangled_attention, make(case, torch.float32), "reference")
    truth, peer = truth_and_peer(case, torch.float32, "cpu")
    assert_close(ours, peer, truth, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case_id", ["length-65", "linear-longer-than-span", "c2p", "p2c"])
def test_closeness_sees_an_off_by_one_row(case_id, dtype):
    case = by_id[case_id]
    call = make(case, dtype)
    shifted = [None if x is None else x.roll(1, 0) for x in call.tensors[3:]]
    wrong = cases.Call((*call.tensors[:3], *shifted), call.dout, call.options, call.defined)
    truth, peer = truth_and_peer(case, dtype, "cpu")
    with pytest.raises(AssertionError, match="out: max error"):
        assert_close(by_op(disentangled_attention, wrong, "reference"), peer, truth, dtype)


def test_gradcheck(backend, device):
    inputs = random_call(5, dtype=torch.float64, device=device, dim=3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]], device=device)
    for options in (
        {},
        {"causal": True},
        {"key_mask": mask, "padded_rows": "uniform"},
        {"key_mask": mask, "dropout_p": 0.3},
    ):

        def seeded(*tensors, options=options):
            torch.manual_seed(5)
            return attend(*tensors, relative_position=LOG, backend=backend, **options)

        assert torch.autograd.gradcheck(seeded, inputs)


# The operators


@pytest.mark.parametrize(
    "case_id", ["c2c", "c2p", "packed-holes", "left-uniform", "dropout", "packed-empty"]
)
def test_opcheck(case_id, backend, device):
    call = make(by_id[case_id], torch.float32, device)
    query, key, value, pos_key, pos_query = call.tensors
    packed = [x.reshape(-1, *x.shape[-2:]) for x in (query, key, value)]
    options = call.options
    mask, cu_seqlens = options["key_mask"], options.get("cu_seqlens")
    rng_state = torch.tensor([3, 0], device=device) if options["dropout_p"] else None
    has_positions = pos_key is not None or pos_query is not None
    arguments = (
        cu_seqlens,
        None if mask is None else mask.flatten(),
        rng_state,
        options.get("max_seqlen", query.size(1)),
        LOG.ints if has_positions else None,
        options["causal"],
        options["dropout_p"],
        0.2,
        options["padded_rows"] == "uniform",
        backend,
    )
    inputs = (*packed, pos_key, pos_query)
    attend(*call.tensors, **options, backend=backend)  # Skips what the backend refuses.
    forward = torch.ops.fastdeberta.forward.default
    results = torch.library.opcheck(forward, (*inputs, *arguments))
    assert set(results.values()) == {"SUCCESS"}
    out, lse = forward(*inputs, *arguments)
    dout = torch.randn_like(out)
    results = torch.library.opcheck(
        torch.ops.fastdeberta.backward.default, (dout, *inputs, out, lse, *arguments)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_lse_is_not_differentiable():
    out, lse = disentangled_attention(
        *random_call(requires_grad=True), relative_position=LOG, return_lse=True
    )
    assert out.requires_grad and not lse.requires_grad


def test_second_derivative_is_refused():
    inputs = random_call(requires_grad=True)
    out = disentangled_attention(*inputs, relative_position=LOG)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_some_inputs_need_gradients(backend, device):
    inputs = random_call(device=device)
    inputs[3].requires_grad_()
    attend(*inputs, relative_position=LOG, backend=backend).sum().backward()
    assert [x.grad is not None for x in inputs] == [False, False, False, True, False]


# Compilers, checkpointing, autocast


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_padded(dynamic, compiler):
    def attention(*inputs, key_mask):
        return disentangled_attention(*inputs, relative_position=LOG, key_mask=key_mask)

    compiled = compiler(attention, dynamic=dynamic)
    for length in (7, 9, 12):
        inputs = random_call(length)
        mask = torch.arange(length) < torch.tensor([[length], [length - 3]])
        expected = grads_of(partial(attention, key_mask=mask), inputs)
        got = grads_of(partial(compiled, key_mask=mask), inputs)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_packed(dynamic, compiler):
    def attention(*inputs, cu_seqlens, max_seqlen):
        return disentangled_attention(
            *inputs,
            relative_position=LOG,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            padded_rows="uniform",
        )

    compiled = compiler(attention, dynamic=dynamic)
    for lengths in ((3, 0, 4), (5, 2, 6), (1, 9, 2)):
        inputs = random_call(sum(lengths), batch=1)
        inputs = (*(x[0] for x in inputs[:3]), *inputs[3:])
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        options = {"cu_seqlens": starts, "max_seqlen": max(lengths)}
        expected = grads_of(partial(attention, **options), inputs)
        got = grads_of(partial(compiled, **options), inputs)
        torch.testing.assert_close(got, expected)


def test_compile_draws_new_dropout_each_run(compiler):
    def attention(*inputs):
        return disentangled_attention(*inputs, relative_position=LOG, dropout_p=0.5)

    compiled = compiler(attention)
    inputs = random_call(16)
    torch.manual_seed(1)
    first, second = compiled(*inputs), compiled(*inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    torch.testing.assert_close((compiled(*inputs), compiled(*inputs)), (first, second))

    def seeded(function, *leaves):
        torch.manual_seed(2)
        return function(*leaves)

    # The backward pass must see the forward's mask.
    torch.testing.assert_close(
        grads_of(partial(seeded, compiled), inputs), grads_of(partial(seeded, attention), inputs)
    )


def test_compile_needs_max_seqlen(compiler):
    inputs = random_call(6, batch=1)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)

    def attention():
        return disentangled_attention(
            *(x[0] for x in inputs[:3]), cu_seqlens=cu_seqlens, backend="reference"
        )

    with pytest.raises(Exception, match="max_seqlen must be given with cu_seqlens in compiled"):
        compiler(attention)()


@pytest.mark.slow
def test_compile_with_inductor(compiler):
    def attention(*inputs):
        out = disentangled_attention(*inputs, relative_position=LOG, causal=True)
        return out.tanh() * 2

    compiled = compiler(attention, backend="inductor")
    inputs = random_call(9)
    torch.testing.assert_close(grads_of(compiled, inputs), grads_of(attention, inputs))


def test_activation_checkpointing_redraws_the_same_dropout():
    def attention(*inputs):
        return disentangled_attention(*inputs, relative_position=LOG, dropout_p=0.4).square()

    inputs = random_call(20)
    torch.manual_seed(3)
    expected = grads_of(attention, inputs)
    torch.manual_seed(3)
    got = grads_of(lambda *x: checkpoint(attention, *x, use_reentrant=False), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_autocast_casts_every_input(backend, device):
    inputs = random_call(20, device=device, dim=16)
    call = partial(attend, relative_position=LOG, return_lse=True, backend=backend)
    mixed = (inputs[0], inputs[1].bfloat16(), *inputs[2:])
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = call(*mixed)
    expected, expected_lse = call(*(x.bfloat16() for x in inputs))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_autocast_gradients_have_the_leaves_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = grads_of(
            partial(disentangled_attention, relative_position=LOG), random_call(8)
        )
    assert out.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = disentangled_attention(*random_call(dtype=torch.float64), relative_position=LOG)
    assert out.dtype == torch.float64


# Layouts and sizes


def test_strides_do_not_matter(backend, device):
    batch, length, heads, dim = 2, 33, 2, 16
    fused = torch.randn(batch, length, heads, 3, dim, device=device)
    query, key, value = fused.unbind(3)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    tables = torch.randn(2, heads, dim, 2 * LOG.span, device=device).permute(0, 3, 1, 2)
    value = value.flip(-1).flip(-1).expand_as(value)[..., :1].expand(-1, -1, -1, dim)
    mask = (torch.arange(2 * length, device=device) % 5 > 0).view(length, 2).t()
    inputs = (query, key, value, *tables)
    assert not any(x.is_contiguous() for x in (*inputs, mask))
    call = partial(attend, relative_position=LOG, key_mask=mask, backend=backend)
    got = [call(*inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    dout = torch.randn(batch, heads, dim, length, device=device).permute(0, 3, 1, 2)
    got += torch.autograd.grad(call(*leaves), leaves, dout)
    copies = [x.detach().contiguous().requires_grad_() for x in inputs]
    out = attend(*copies, relative_position=LOG, key_mask=mask.contiguous(), backend=backend)
    expected = [out, *torch.autograd.grad(out, copies, dout.contiguous())]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, 0)])
def test_empty_batch(batch, length, backend, device):
    inputs = random_call(length, batch, device=device, requires_grad=True)
    mask = torch.ones(batch, length, dtype=torch.bool, device=device)
    out, lse = attend(
        *inputs, relative_position=LOG, key_mask=mask, return_lse=True, backend=backend
    )
    assert out.shape == (batch, length, 2, 4) and lse.shape == (batch, 2, length)
    out.sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("max_seqlen", [None, 0, 7])
def test_no_tokens(max_seqlen, backend, device):
    query, key, value, *tables = random_call(0, 1, device=device)
    out, lse = attend(
        query[0],
        key[0],
        value[0],
        *tables,
        relative_position=LOG,
        cu_seqlens=torch.zeros(4, dtype=torch.int32, device=device),
        max_seqlen=max_seqlen,
        return_lse=True,
        backend=backend,
    )
    assert out.shape == (0, 2, 4) and lse.shape == (2, 0)


def test_lse_shapes_and_dtypes():
    for dtype in DTYPES:
        inputs = random_call(5, dtype=dtype)
        call = partial(disentangled_attention, relative_position=LOG, return_lse=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        _, lse = call(*inputs)
        assert lse.shape == (2, 2, 5) and lse.dtype == wide
        cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
        _, packed = call(*(x.flatten(0, 1) for x in inputs[:3]), *inputs[3:], cu_seqlens=cu_seqlens)
        assert packed.shape == (2, 10) and packed.dtype == wide
        assert torch.equal(packed.view(2, 2, 5).transpose(0, 1), lse)


@pytest.mark.parametrize("max_seqlen", [None, 40])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_packed_equals_padded(dropout_p, max_seqlen, backend, device):
    lengths = torch.tensor([33, 1, 0, 17], device=device)
    inputs = random_call(33, 4, device=device, dim=16)
    mask = torch.arange(33, device=device) < lengths[:, None]
    dout = torch.randn_like(inputs[0]) * mask[..., None, None]
    results = []
    for packed in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        content, tables = leaves[:3], leaves[3:]
        options = {"key_mask": mask}
        if packed:
            content = [x[mask] for x in content]
            cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
            options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        torch.manual_seed(7)
        out = attend(
            *content,
            *tables,
            relative_position=LOG,
            dropout_p=dropout_p,
            backend=backend,
            **options,
        )
        grads = torch.autograd.grad(out, leaves, dout[mask] if packed else dout)
        results.append((out if packed else out[mask], *grads))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_key_mask(dtype):
    inputs = random_call()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 2, 1, 0, 1, 1]])
    call = partial(disentangled_attention, *inputs, relative_position=LOG)
    assert torch.equal(call(key_mask=mask.to(dtype)), call(key_mask=mask.bool()))


def test_masked_rows():
    inputs = random_call()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    call = partial(disentangled_attention, *inputs, relative_position=LOG, return_lse=True)
    (zeros, lse), (uniform, same_lse) = (
        call(key_mask=mask, padded_rows=rows) for rows in ("zeros", "uniform")
    )
    assert not zeros[~mask].any() and torch.equal(zeros[mask], uniform[mask])
    average = inputs[2].mean(1, keepdim=True).expand_as(uniform)
    torch.testing.assert_close(uniform[~mask], average[~mask])
    assert torch.equal(lse, same_lse)
    assert torch.equal(lse.isinf(), ~mask[:, None].expand_as(lse))


def test_masked_keys_and_tables_of_absent_terms_change_nothing():
    query, key, value, *tables = random_call()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]]).bool()
    call = partial(disentangled_attention, relative_position=LOG, key_mask=mask)
    expected = call(query, key, value, *tables)
    hidden = ~mask[..., None, None]
    got = call(query, key.masked_fill(hidden, 1e4), value.masked_fill(hidden, 1e4), *tables)
    assert torch.equal(got[mask], expected[mask])
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value))
    ).transpose(1, 2)
    torch.testing.assert_close(disentangled_attention(query, key, value), plain)
