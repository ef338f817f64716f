"""Padding left out of a batch, and packed sequences, change no result."""

import pytest
import tiny
import torch
from torch import nn

from fastdeberta import packing
from fastdeberta.models import Model
from fastdeberta.packing import Packing, PaddedStates

LONG = 41
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def masks():
    """Of three sequences, where there is a token: [3, 41]."""
    position, length = torch.arange(LONG), torch.tensor([[LONG], [23], [1]])
    right, left = position < length, position >= LONG - length
    holes = left & (position % 5 > 0)
    holes[2, -1] = True
    return {"right": right, "left": left, "holes": holes}


MODELS = {
    "v1": ("deberta", "base", {}),
    "v1-biased": ("deberta", "base", {"position_biased_input": True, "type_vocab_size": 2}),
    "v3": ("deberta-v2", "base", {}),
    "v3-types": ("deberta-v2", "base", {"position_biased_input": True, "type_vocab_size": 2}),
    "conv": ("deberta-v2", "base", {"conv_kernel_size": 3}),
    "wide-conv": ("deberta-v2", "base", {"conv_kernel_size": 7, "conv_groups": 4}),
    "electra": ("electra", "base", {}),
    "mlm": ("deberta-v2", "mlm", {}),
    "emd": ("deberta-v2", "mlm", {"emd": True}),
    "emd-v1": ("deberta", "mlm", {"emd": True}),
    "emd-narrow": ("deberta-v2", "mlm", {"emd": True, "embedding_size": 20}),
    "generator": ("electra", "mlm", {}),
    "rtd": ("deberta-v2", "rtd", {}),
    "discriminator": ("electra", "rtd", {}),
    "causal": ("deberta-v2", "causal", {}),
    "causal-electra": ("electra", "causal", {}),
    "sequence": ("deberta-v2", "sequence", {}),
    "token": ("electra", "token", {}),
}


def made(name):
    family, head, changes = MODELS[name]
    return tiny.randomize(Model(tiny.config(family, **changes), head))


def inputs_of(model, mask):
    inputs = {"input_ids": tiny.token_ids(*mask.shape), "attention_mask": mask.long()}
    if model.config.type_vocab_size:
        inputs["token_type_ids"] = (torch.arange(LONG) > 9).long().expand(mask.shape)
    if model.head_name == "sequence":
        inputs["labels"] = torch.tensor([0, 1, 1])
    elif model.head_name != "base":
        high = 2 if model.head_name in ("rtd", "token") else 67
        labels = torch.randint(high, mask.shape, generator=torch.Generator().manual_seed(2))
        scored = mask if model.head_name == "rtd" else mask & (torch.arange(LONG) % 3 > 0)
        inputs["labels"] = labels.masked_fill(~scored, -100)
    return inputs


def results(model, inputs, mask):
    """States and logits of the tokens, and the gradients of all of them at once."""
    output = model(**inputs, output_hidden_states=True)
    states = [x[mask] if x.dim() == 3 else x for x in output.hidden_states]
    logits = [] if output.logits is None else [output.logits]
    if model.head_name not in ("base", "sequence") and logits[0].shape[:2] == mask.shape:
        logits = [logits[0][mask]]
    total = sum((x.sin().sum() for x in [*states, *logits]), output.loss or 0.0)
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [*states, *logits], grads


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            size = b.abs().max().clamp(min=1)
            torch.testing.assert_close(a / size, b / size, **CLOSE)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_without_padding_as_with_it(name, side):
    model, mask = made(name), masks()[side]
    inputs = inputs_of(model, mask)
    model.backbone.unpad = False
    expected = results(model, inputs, mask)
    model.backbone.unpad = True
    seen = []
    model.backbone.encoder.layer[0].register_forward_pre_hook(
        lambda layer, args: seen.append(args[0].shape[:-1])
    )
    assert_same(results(model, inputs, mask), expected)
    assert len(seen[0]) == 1 and seen[0][0] < mask.numel()


@pytest.mark.parametrize("name", MODELS)
def test_packed_as_padded(name):
    model, mask = made(name), masks()["right"]
    inputs = inputs_of(model, mask)
    model.backbone.unpad = False
    expected = results(model, inputs, mask)
    packed = {k: x[mask] if x.shape == mask.shape else x for k, x in inputs.items()}
    del packed["attention_mask"]
    packed["cu_seqlens"] = torch.tensor([0, 41, 64, 65], dtype=torch.int32)
    packed["max_seqlen"] = LONG
    assert_same(results(model, packed, mask), expected)


@pytest.mark.parametrize("name", ["v1", "v3", "conv", "electra", "causal", "emd"])
def test_documents_in_one_row_do_not_see_each_other(name):
    model = made(name)
    documents = [tiny.token_ids(n) for n in (17, 1, 9)]
    ids, cu_seqlens, max_seqlen = packing.pack(documents)
    assert cu_seqlens.tolist() == [0, 17, 18, 27] and max_seqlen == 17
    row = model(ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen).last_hidden_state
    alone = [model(document[None]).last_hidden_state[0] for document in documents]
    torch.testing.assert_close(row, torch.cat(alone), **CLOSE)
    together = model(ids[None]).last_hidden_state[0]
    assert (together - row).abs().max() > 0.1, "without cu_seqlens they do"


def test_compiled_code_keeps_its_padding():
    """What is left out depends on values, which a graph must not."""
    model, mask = made("v3"), masks()["left"]
    inputs = inputs_of(model, mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(**inputs).last_hidden_state[mask]
    torch.testing.assert_close(compiled(**inputs).last_hidden_state[mask], expected, **CLOSE)


@pytest.mark.parametrize("name", ["v3", "mlm"])
def test_rows_of_padding_are_zeros(name):
    model, mask = made(name), masks()["holes"]
    output = model(**inputs_of(model, mask), output_hidden_states=True)
    for state in output.hidden_states:
        assert not state[~mask].any() and state[mask].any(-1).all()


def test_packing():
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    packed = Packing.of(mask)
    assert packed.kept.tolist() == [1, 2, 3, 5, 6, 7]
    assert packed.key_mask.tolist() == [True, False, True, True, True, True]
    assert packed.cu_seqlens.tolist() == [0, 3, 6, 6] and packed.max_seqlen == 3
    x = torch.arange(1.0, 31.0).view(3, 5, 2)
    rows = packed.pack(x)
    assert torch.equal(rows, x.view(15, 2)[packed.kept])
    assert torch.equal(packed.pad(rows), x * mask[..., None])
    assert torch.equal(packed.pack(torch.arange(5)[None]), torch.tensor([1, 2, 3, 0, 1, 2]))
    states = PaddedStates([rows, rows + 1], packed)
    assert len(states) == 2 and states[-1] is states[1]
    assert [s.shape for s in states] == [s.shape for s in states[:]] == [(3, 5, 2)] * 2


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3), torch.zeros(2, 3, 3)])
def test_nothing_to_leave_out(mask):
    assert Packing.of(mask) is None


def test_positions_of_packed_tokens():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert packing.positions(cu_seqlens, 5).tolist() == [0, 1, 0, 1, 2]
    assert packing.sequence_of(cu_seqlens, 5).tolist() == [0, 0, 2, 2, 2]


def test_pack_needs_a_sequence():
    with pytest.raises(ValueError, match="sequences must hold at least one sequence, got none"):
        packing.pack([])


def test_padding_costs_no_time_in_the_layers():
    """The first linear layer of a batch that is four fifths padding sees the tokens alone."""
    model = made("v3").train()
    counted = []
    for part in model.backbone.encoder.layer.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _, args, __: counted.append(args[0].shape[0]))
    mask = masks()["right"]
    model(**inputs_of(model, mask))
    assert set(counted) == {int(mask.sum()), 16}, "and of the relative table, its rows"
