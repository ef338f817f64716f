import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import LOG, random_call

import fastdeberta
from fastdeberta import backends, disentangled_attention, explain


@pytest.fixture
def registry(monkeypatch):
    """The reference alone, behind three backends: absent, refusing, and counting its calls."""
    reference = backends.load("reference")
    calls = []

    def forward(*args):
        calls.append(args)
        return reference.forward(*args)

    modules = {
        "absent": SimpleNamespace(unavailable=lambda: "no such device"),
        "refusing": SimpleNamespace(
            unavailable=lambda: None, unsupported=lambda query, params: "head dim too odd"
        ),
        "counting": SimpleNamespace(
            unavailable=lambda: None,
            unsupported=lambda query, params: None,
            forward=forward,
            backward=reference.backward,
        ),
        "reference": reference,
    }
    monkeypatch.setattr(backends, "MODULES", {name: f"registry.{name}" for name in modules})
    monkeypatch.setattr(backends, "PREFERENCE", tuple(modules))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"registry.{name}", module)
    return SimpleNamespace(calls=calls)


def test_every_backend_says_whether_it_can_be_used():
    available = fastdeberta.available_backends()
    assert available["reference"] is None
    assert list(available) == list(backends.MODULES)
    assert all(reason is None or len(reason) > 3 for reason in available.values())
    for name in backends.MODULES:
        for function in ("unavailable", "unsupported", "forward", "backward"):
            assert callable(getattr(backends.load(name), function))


def test_auto_prefers_registered_backends_and_ends_with_the_reference():
    assert set(backends.PREFERENCE) <= set(backends.MODULES)
    assert backends.PREFERENCE[-1] == "reference"


def test_explain_names_a_usable_backend():
    explanation = explain(*random_call(), relative_position=LOG)
    assert fastdeberta.available_backends()[explanation.backend] is None
    assert str(explanation).startswith(f"auto takes {explanation.backend!r}")


def test_explain_says_why_others_were_passed_over(registry):
    explanation = explain(*random_call(), relative_position=LOG)
    assert explanation.backend == "counting"
    assert explanation.passed_over == {"absent": "no such device", "refusing": "head dim too odd"}
    assert str(explanation) == (
        "auto takes 'counting'\n  not 'absent': no such device\n  not 'refusing': head dim too odd"
    )
    assert not registry.calls, "explain computes nothing"


def test_a_backend_may_yield_to_a_later_one(registry, monkeypatch):
    yielding = sys.modules["registry.counting"]
    monkeypatch.setattr(yielding, "yields", lambda query, params: "too long", raising=False)
    explanation = explain(*random_call(), relative_position=LOG)
    assert explanation.backend == "reference"
    assert explanation.passed_over["counting"] == "too long"
    disentangled_attention(*random_call(), relative_position=LOG, backend="counting")
    assert len(registry.calls) == 1, "whoever names it gets it"
    monkeypatch.setattr(backends, "PREFERENCE", ("refusing", "counting"))
    explanation = explain(*random_call(), relative_position=LOG)
    assert explanation.backend == "counting", "there is nobody to yield to"
    assert explanation.passed_over == {"refusing": "head dim too odd"}


def test_auto_uses_what_explain_names(registry):
    disentangled_attention(*random_call(), relative_position=LOG)
    assert len(registry.calls) == 1


@pytest.mark.parametrize(
    ("name", "reason"), [("absent", "no such device"), ("refusing", "head dim too odd")]
)
def test_a_named_backend_is_never_replaced(name, reason, registry):
    with pytest.raises(ValueError, match=f"backend '{name}' cannot take this call: {reason}"):
        disentangled_attention(*random_call(), relative_position=LOG, backend=name)
    disentangled_attention(*random_call(), relative_position=LOG, backend="reference")
    assert not registry.calls


def test_auto_with_nothing_left(registry, monkeypatch):
    monkeypatch.setattr(backends, "PREFERENCE", ("absent", "refusing"))
    with pytest.raises(ValueError, match="no backend can take this call: .*absent.*head dim"):
        disentangled_attention(*random_call(), relative_position=LOG)


def test_backends_see_the_call_as_the_op_resolved_it(registry):
    inputs = random_call()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    disentangled_attention(
        *inputs, relative_position=LOG, key_mask=mask, padded_rows="uniform", dropout_p=0.25
    )
    ((query, key, value, pos_key, pos_query, params),) = registry.calls
    assert query.shape == key.shape == value.shape == (12, 2, 4)
    assert query.data_ptr() == inputs[0].data_ptr(), "padded input is a view, not a copy"
    assert pos_key.shape == pos_query.shape == (2 * LOG.span, 2, 4)
    assert torch.equal(params.key_mask, mask.flatten().bool())
    assert params.cu_seqlens is None and params.max_seqlen == 6
    assert params.softmax_scale == pytest.approx((4 * 3) ** -0.5)
    assert params.dropout_p == 0.25 and params.rng_state.shape == (2,)
    assert params.rng_state.dtype == torch.int64 and params.uniform_padding
    assert torch.equal(params.rows.rows, LOG.table().rows)


def test_uniform_rows_without_a_mask_are_nothing_to_a_backend(registry):
    disentangled_attention(*random_call(), relative_position=LOG, padded_rows="uniform")
    assert not registry.calls[0][-1].uniform_padding


def test_reference_gives_the_same_by_any_number_of_heads_at_once(monkeypatch):
    """Of the dropout mask too, each group of heads takes its own part."""
    reference = backends.load("reference")
    query, key, value = (torch.randn(2, 20, 3, 8, dtype=torch.float64) for _ in range(3))
    tables = [torch.randn(16, 3, 8, dtype=torch.float64) for _ in range(2)]
    inputs = [x.requires_grad_() for x in (query, key, value, *tables)]
    results = []
    for scores_at_once in (2**20, 1):
        monkeypatch.setattr(reference, "_SCORES_AT_ONCE", scores_at_once)
        torch.manual_seed(0)
        out, lse = fastdeberta.disentangled_attention(
            *inputs,
            relative_position=fastdeberta.RelativePosition(8, 8, 16),
            dropout_p=0.3,
            return_lse=True,
            backend="reference",
        )
        results.append([out, lse, *torch.autograd.grad(out.square().sum(), inputs)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_the_first_call_may_be_compiled():
    """torch.compile imports nothing: what it meets in a fresh process must be there already."""
    code = """if True:
        import torch
        from fastdeberta import disentangled_attention
        call = torch.compile(disentangled_attention, backend="eager", fullgraph=True)
        print(call(*torch.randn(3, 2, 5, 2, 8)).shape)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 5, 2, 8])"
