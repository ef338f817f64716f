"""accelerate() and restore(): transformers' models compute the same on our attention."""

import copy
import pickle

import pytest
import tiny
import torch
from closeness import assert_close
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaForSequenceClassification,
    DebertaModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
)

from fastdeberta import DisentangledAttention, RelativePosition, accelerate, restore

V1 = tiny.SIZES | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}
MODELS = {
    "v1": (DebertaModel, DebertaConfig, V1),
    "v1-c2p": (DebertaModel, DebertaConfig, V1 | {"pos_att_type": ["c2p"]}),
    "v1-talking": (DebertaModel, DebertaConfig, V1 | {"talking_head": True}),
    "v1-mlm": (DebertaForMaskedLM, DebertaConfig, V1 | {"legacy": False}),
    "v1-sequence": (DebertaForSequenceClassification, DebertaConfig, V1),
    "v2": (DebertaV2Model, DebertaV2Config, tiny.DEBERTA),
    "v2-conv": (DebertaV2Model, DebertaV2Config, tiny.DEBERTA | {"conv_kernel_size": 3}),
    "v2-p2c": (
        DebertaV2Model,
        DebertaV2Config,
        tiny.DEBERTA | {"pos_att_type": ["p2c"], "share_att_key": False, "position_buckets": -1},
    ),
    "v2-c2c": (DebertaV2Model, DebertaV2Config, tiny.DEBERTA | {"relative_attention": False}),
    "v2-sequence": (DebertaV2ForSequenceClassification, DebertaV2Config, tiny.DEBERTA),
}
FAMILIES = ["v1", "v2"]

LENGTHS = torch.tensor([41, 23, 1])
MASK = (torch.arange(41) < LENGTHS[:, None]).long()
INPUTS = {"input_ids": tiny.token_ids(3, 41) * MASK, "attention_mask": MASK}


def model_of(name, **changes):
    kind, config, settings = MODELS[name]
    return tiny.randomize(kind(config(**settings | changes)))


def attentions(model):
    return [m for m in model.modules() if isinstance(m, DisentangledAttention)]


def first(output):
    """The logits, or the last hidden states with those of padding."""
    return output[0]


def run(model, dtype, **options):
    model = copy.deepcopy(model).to(dtype)
    output = model(**INPUTS, **options)
    out = first(output)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (out * weights).sum().backward()
    results = {"out": out}
    results |= {f"probs {i}": p for i, p in enumerate(output.get("attentions") or ())}
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results, grads


def assert_parity(theirs, ours, **options):
    """Ours is as near to transformers in float64 as transformers in float32 is."""
    runs = [run(theirs, torch.float64, **options), run(theirs, torch.float32, **options)]
    runs.append(run(ours, torch.float32, **options))
    # Sums over tokens grow with the weights; the rule's allowance is for values near one.
    sizes = {name: grad.abs().max().clamp(min=1) for name, grad in runs[0][1].items()}
    truth, peer, mine = (
        results | {name: grad / sizes[name] for name, grad in grads.items()}
        for results, grads in runs
    )
    assert_close(mine, peer, truth, torch.float32)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name, training):
    theirs = model_of(name).train(training)
    ours = accelerate(copy.deepcopy(theirs))
    assert len(attentions(ours)) == theirs.config.num_hidden_layers
    assert_parity(theirs, ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_position_terms_matter_here(name):
    """The negative control: weights at their initial size would hide a missing bias."""
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    attention = attentions(ours)[0]
    bias = attention.pos_q_proj.bias if name == "v1" else attention.query_proj.bias
    with torch.no_grad():
        bias += 1e-4
    with pytest.raises(AssertionError, match="out: max error"):
        assert_parity(theirs, ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_attentions(name):
    theirs = model_of(name)
    assert_parity(theirs, accelerate(copy.deepcopy(theirs)), output_attentions=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name):
    theirs = model_of(name).train()
    ours = accelerate(copy.deepcopy(theirs))
    ours.gradient_checkpointing_enable()
    assert_parity(theirs, ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_in_training_only(name):
    ours = accelerate(model_of(name, attention_probs_dropout_prob=0.3))
    assert torch.equal(first(ours(**INPUTS)), first(ours(**INPUTS)))
    ours.train()
    assert not torch.equal(first(ours(**INPUTS)), first(ours(**INPUTS)))


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_quadratic_is_built_for_a_2d_mask(name):
    ours = accelerate(model_of(name))
    seen = []
    attentions(ours)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    ours(**INPUTS)
    assert any(isinstance(x, RelativePosition) for x in seen)
    assert max(x.dim() for x in seen[1:] if isinstance(x, torch.Tensor)) == 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_masks_given_to_the_encoder(name, dims):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    pairs = MASK[:, None] * MASK[:, :, None] * torch.ones(41, 41, dtype=torch.long).tril()
    mask = {2: MASK, 3: pairs, 4: pairs[:, None]}[dims]
    hidden = torch.randn(3, 41, 32)
    got, expected = (first(model.encoder(hidden, mask)) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_distances_given_to_the_encoder(name):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    position = torch.arange(41)
    distances = (position[:, None] - position[None]).div(2, rounding_mode="trunc")
    call = {"hidden_states": torch.randn(3, 41, 32), "attention_mask": MASK}
    plain, got, expected = (
        first(model.encoder(**call, relative_pos=relative))
        for model, relative in ((ours, None), (ours, distances), (theirs, distances))
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (plain - got).abs().max() > 0.1


# What stays as it was


@pytest.mark.parametrize("name", MODELS)
def test_same_parameters_under_the_same_names(name):
    model = model_of(name)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    assert accelerate(model) is model
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert len(list(model.parameters())) == len(parameters)


@pytest.mark.parametrize("name", MODELS)
def test_restore(name):
    model = model_of(name)
    expected, kinds = first(model(**INPUTS)), [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    assert restore(accelerate(model)) is model
    assert [type(m) for m in model.modules()] == kinds
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert torch.equal(first(model(**INPUTS)), expected)


def test_restored_model_has_what_the_accelerated_one_learned():
    model = accelerate(model_of("v2"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first(model(**INPUTS)).square().mean().backward()
    optimizer.step()
    model.double().train()
    learned = copy.deepcopy(model.state_dict())
    restore(model)
    assert all(torch.equal(learned[n], x) for n, x in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert first(model(**INPUTS)).dtype == torch.float64


def test_inside_another_module():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"v1": model_of("v1"), "v2": model_of("v2")})
            self.head = nn.Linear(32, 2)

        def forward(self):
            return self.head(sum(first(model(**INPUTS)) for model in self.inner.values()))

    wrapper = Wrapper()
    expected = wrapper()
    assert accelerate(wrapper) is wrapper and len(attentions(wrapper)) == 6
    torch.testing.assert_close(wrapper(), expected, rtol=1e-4, atol=1e-4)
    restore(wrapper)
    assert not attentions(wrapper) and torch.equal(wrapper(), expected)


def test_again_changes_the_backend():
    model = accelerate(model_of("v2"))
    before = attentions(model)
    assert {module.backend for module in before} == {"auto"}
    expected = first(model(**INPUTS))
    accelerate(model, "reference")
    assert attentions(model) == before
    assert {module.backend for module in before} == {"reference"}
    torch.testing.assert_close(first(model(**INPUTS)), expected, rtol=1e-4, atol=1e-5)
    restore(model)
    assert not attentions(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_saving_and_loading(name, tmp_path):
    model = model_of(name)
    keys = model.state_dict()
    accelerate(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(keys)
    assert all(torch.equal(x, keys[n]) for n, x in again.state_dict().items())
    model.load_state_dict(again.state_dict())


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("name", FAMILIES)
def test_copies(name, clone):
    model = accelerate(model_of(name))
    expected = first(model(**INPUTS))
    twin = clone(model)
    assert torch.equal(first(twin(**INPUTS)), expected)
    with torch.no_grad():  # A copy on its own: neither one sees the other's weights.
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(first(model(**INPUTS)), expected)
    restore(twin)
    assert not attentions(twin) and len(attentions(model)) == 3
    assert not any(p.any() for p in twin.parameters())


# Errors


@pytest.mark.parametrize("model", [ElectraModel(ElectraConfig(**tiny.ELECTRA)), nn.Linear(2, 2)])
def test_nothing_to_accelerate(model):
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"no DeBERTa attention to accelerate in {name}; expected"):
        accelerate(model)


def test_unknown_backend():
    model = model_of("v2")
    with pytest.raises(ValueError, match="backend must be one of auto, .*; got 'nope'"):
        accelerate(model, "nope")
    assert not attentions(model)


def test_attention_without_a_config():
    attention = model_of("v2").encoder.layer[0].attention.self
    with pytest.raises(ValueError, match="inside Sequential, which has no config"):
        accelerate(nn.Sequential(attention))


def test_restore_without_accelerate():
    model = model_of("v2")
    with pytest.raises(ValueError, match="DebertaV2Model holds no accelerated attention"):
        restore(model)
    restore(accelerate(model))
    with pytest.raises(ValueError, match="holds no accelerated attention"):
        restore(model)
