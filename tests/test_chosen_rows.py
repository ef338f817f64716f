"""Backbones asked for some tokens alone: those tokens' states and gradients, nothing else."""

import pytest
import tiny
import torch

from fastdeberta.models import Model
from fastdeberta.packing import Packing

B, L = 3, 17
MASK = torch.arange(L) < torch.tensor([17, 9, 1])[:, None]
ROWS = torch.tensor([0, 5, 16, 17, 25, 34])  # Of the flattened batch, real tokens all.
MODELS = {
    "v3": ("deberta-v2", {}),
    "v3 of one layer": ("deberta-v2", {"num_hidden_layers": 1}),
    "convolution": ("deberta-v2", {"conv_kernel_size": 3}),
    "convolution, one layer": ("deberta-v2", {"conv_kernel_size": 3, "num_hidden_layers": 1}),
    "mask decoder": ("deberta-v2", {"emd": True}),
    "mask decoder, one pass": ("deberta", {"emd": True, "emd_passes": 1}),
    "v1": ("deberta", {}),
    "electra": ("electra", {}),
}


def states_and_gradients(backbone, rows, inputs, packed, alone):
    if alone:
        (chosen,) = backbone(*inputs, rows=rows, **packed)
    else:
        chosen = backbone(*inputs, **packed)[-1].flatten(0, -2)[rows]
    if not torch.is_grad_enabled():
        return chosen, {}
    backbone.zero_grad()
    chosen.sin().sum().backward()
    zero = {n: torch.zeros_like(p) for n, p in backbone.named_parameters()}
    return chosen, zero | {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["training", "modules", "inference"])
@pytest.mark.parametrize("layout", ["full", "padded", "padded, kept", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_chosen_rows_are_those_of_the_whole(name, layout, mode):
    """In float64, and on packed weights, which are for float32."""
    family, changes = MODELS[name]
    training, fast = mode == "training", mode == "inference"
    backbone = tiny.randomize(Model(tiny.config(family, **changes), "mlm")).backbone
    backbone.to(torch.float32 if fast else torch.float64)
    backbone.train(training)
    backbone.unpad = layout != "padded, kept"
    ids, rows = tiny.token_ids(B, L), ROWS
    inputs, packed = (ids, None if layout == "full" else MASK), {}
    if layout == "packed":
        packing = Packing.of(MASK)
        rows = torch.searchsorted(packing.kept, ROWS)
        inputs = (ids[MASK],)
        packed = {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}
    with torch.set_grad_enabled(training):
        whole, expected = states_and_gradients(backbone, rows, inputs, packed, alone=False)
        chosen, gradients = states_and_gradients(backbone, rows, inputs, packed, alone=True)
        other = backbone(*inputs, rows=rows.flip(0), **packed)[0]
    close = 1e-5 if fast else 1e-10
    torch.testing.assert_close(chosen, whole, rtol=close, atol=close)
    assert (backbone.encoder.inference._prepared is not None) == fast
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(other, whole)


def test_the_last_feed_forward_network_sees_the_chosen_rows_alone():
    seen = []
    for changes, layers in (({}, 3), ({"emd": True}, 3)):
        backbone = Model(tiny.config(**changes), "mlm").backbone.train()
        for layer in backbone.encoder.layer:
            layer.intermediate.register_forward_hook(lambda m, x, y: seen.append(y[..., 0].numel()))
        backbone(tiny.token_ids(B, L), rows=ROWS)
        assert seen[:2] == [B * L] * 2 and seen[-1] == len(ROWS)
        assert len(seen) == layers + (1 if changes else 0)
        seen.clear()


@pytest.mark.parametrize("side", ["right", "left", "packed"])
@pytest.mark.parametrize("head", ["sequence", "choice"])
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_heads_that_read_the_first_tokens(family, head, side):
    model = tiny.randomize(Model(tiny.config(family), head)).double()
    ids, more = tiny.token_ids(B, L), {"labels": torch.zeros(B, dtype=torch.long)}
    if side == "packed":
        packing = Packing.of(MASK)
        inputs = (ids[MASK],)
        more |= {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}
        more |= {"num_choices": 1} if head == "choice" else {}
    else:
        inputs = (ids, MASK if side == "right" else MASK.flip(1))
        if head == "choice":
            inputs = tuple(x[:, None] for x in inputs)
    whole, first = model(*inputs, **more), model(*inputs, **more, first_only=True)
    torch.testing.assert_close(first.logits, whole.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(first.loss, whole.loss)
    assert first.last_hidden_state.shape == (B, 32)


def test_heads_that_read_all_tokens_refuse():
    ids = tiny.token_ids(B, L)
    with pytest.raises(ValueError, match="first_only is for the heads sequence and choice"):
        Model(tiny.config(), "token")(ids, first_only=True)
    with pytest.raises(ValueError, match="without output_hidden_states"):
        Model(tiny.config(), "sequence")(ids, first_only=True, output_hidden_states=True)
