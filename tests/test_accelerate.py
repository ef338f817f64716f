"""accelerate() and restore(): transformers' models compute the same on our attention."""

import copy
import pickle
import re

import pytest
import tiny
import torch
import transformers
from closeness import assert_close
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraForCausalLM,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

from fastdeberta import RelativePosition, accelerate, restore

IS_4 = transformers.__version__.startswith("4.")

V1 = tiny.SIZES | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}
# Without tie_word_embeddings=False, transformers 4.57 ties lm_head.dense, which it takes for the
# output embeddings of legacy=False, to the word embeddings, and its forward fails.
V1_MLM = V1 | {"legacy": False, "tie_word_embeddings": False}
ELECTRA = tiny.ELECTRA | {"attn_implementation": "eager"}


def named(kind, config, settings, **variants):
    return {name: (kind, config, settings | changes) for name, changes in variants.items()}


MODELS = {
    **named(
        DebertaModel,
        DebertaConfig,
        V1,
        **{
            "v1": {},
            "v1-c2p": {"pos_att_type": ["c2p"]},
            "v1-p2c": {"pos_att_type": "p2c"},
            "v1-p2p": {"pos_att_type": "p2p|c2p|p2c"},
            "v1-talking": {"talking_head": True},
            "v1-c2c": {"relative_attention": False},
            "v1-positions": {"position_biased_input": True, "type_vocab_size": 2},
        },
    ),
    **named(
        DebertaV2Model,
        DebertaV2Config,
        tiny.DEBERTA,
        **{
            "v2": {},
            "v2-conv": {"conv_kernel_size": 3, "conv_act": "gelu"},
            "v2-c2p": {"pos_att_type": "c2p", "norm_rel_ebd": "none"},
            "v2-p2c": {"pos_att_type": ["p2c"], "share_att_key": False, "position_buckets": -1},
            "v2-own-keys": {"share_att_key": False, "hidden_act": "relu"},
            "v2-c2c": {"relative_attention": False},
            "v2-positions": {"position_biased_input": True, "type_vocab_size": 2},
            "v2-embedding": {"embedding_size": 20, "max_relative_positions": -1},
        },
    ),
    **named(
        ElectraModel,
        ElectraConfig,
        tiny.ELECTRA,
        **{
            "electra": {"attn_implementation": "eager"},
            "electra-sdpa": {} if IS_4 else {"attn_implementation": "sdpa"},
            "electra-embedding": {"embedding_size": 32, "hidden_act": "relu"},
            "electra-chunks": {"chunk_size_feed_forward": 1},
            # Of transformers 4.57; later ones leave it out.
            "electra-relative": {"position_embedding_type": "relative_key_query"},
        },
    ),
}
FAMILIES = ["v1", "v2", "electra"]
DEBERTA = ["v1", "v2"]

# Every class that transformers has.
CLASSES = sorted(
    name
    for name in dir(transformers)
    if re.fullmatch(r"(Deberta|DebertaV2|Electra)(Model|For[A-Z]\w*)", name)
)

LENGTHS = torch.tensor([41, 23, 1])
MASK = (torch.arange(41) < LENGTHS[:, None]).long()
INPUTS = {"input_ids": tiny.token_ids(3, 41) * MASK, "attention_mask": MASK}


def model_of(name, **changes):
    kind, config, settings = MODELS[name]
    return tiny.randomize(kind(config(**settings | changes)))


def attentions(model):
    """Those on our op."""
    return [m for m in model.modules() if hasattr(m, "backend")]


def first(output):
    """The logits, or the last hidden states with those of padding."""
    return output[0]


def run(model, dtype, inputs, **options):
    model = copy.deepcopy(model).to(dtype)
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    output = model(**inputs, **options)
    results = {name: x for name, x in output.items() if isinstance(x, torch.Tensor)}
    generator = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in results.values())
    loss.backward()
    for name in ("attentions", "hidden_states"):
        results |= {f"{name} {i}": x for i, x in enumerate(output.get(name) or ())}
    grads = {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results, grads


def assert_parity(theirs, ours, inputs=INPUTS, **options):
    """Ours is as near to transformers in float64 as transformers in float32 is."""
    models = ((theirs, torch.float64), (theirs, torch.float32), (ours, torch.float32))
    runs = [run(model, dtype, inputs, **options) for model, dtype in models]
    # The rule's allowance is for values near one, and sums over tokens are not. One scale for all:
    # of gradients that cancel out (a key's bias) only the rounding of the others is left.
    size = max(grad.abs().max().item() for grad in runs[0][1].values())
    truth, peer, mine = (
        results | {name: grad / max(size, 1) for name, grad in grads.items()}
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


def labels_of(name, ids):
    """What a class takes as labels, and its inputs."""
    inputs, first_of = dict(INPUTS), ids[:, 0] % 2
    if "QuestionAnswering" in name:
        return inputs | {"start_positions": first_of, "end_positions": first_of * 3}
    if "MultipleChoice" in name:
        inputs = {key: x[None] for key, x in inputs.items()}
        return inputs | {"labels": torch.tensor([1])}
    if "Sequence" in name:
        return inputs | {"labels": first_of}
    if "Token" in name or "PreTraining" in name:
        return inputs | {"labels": ids % 2}
    return inputs if name.endswith("Model") else inputs | {"labels": ids}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name, side, training):
    """Losses too, of which those of question answering read padding."""
    family = re.match("DebertaV2|Deberta|Electra", name)[0]
    _, config, settings = MODELS[{"Deberta": "v1", "DebertaV2": "v2", "Electra": "electra"}[family]]
    settings = settings | ({"tie_word_embeddings": False} if "MaskedLM" in name else {})
    theirs = tiny.randomize(getattr(transformers, name)(config(**settings))).train(training)
    ours = accelerate(copy.deepcopy(theirs))
    assert len(attentions(ours)) == theirs.config.num_hidden_layers
    inputs = labels_of(name, INPUTS["input_ids"])
    if side == "left":
        inputs = {key: x.flip(-1) if x.size(-1) == 41 else x for key, x in inputs.items()}
    assert_parity(theirs, ours, inputs)


def test_every_class_is_known():
    assert len(CLASSES) >= 19 and {"DebertaModel", "ElectraForCausalLM"} < set(CLASSES)


@pytest.mark.parametrize("name", FAMILIES)
def test_small_errors_show(name):
    """The negative control: weights at their initial size would hide a missing bias."""
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    attention = attentions(ours)[0]
    names = {"v1": "pos_q_proj", "v2": "query_proj", "electra": "query"}
    with torch.no_grad():
        getattr(attention, names[name]).bias.add_(1e-4)
    with pytest.raises(AssertionError, match="last_hidden_state: max error"):
        assert_parity(theirs, ours)


ARGUMENTS = {
    "no-mask": lambda: {"input_ids": INPUTS["input_ids"]},
    "full-mask": lambda: {"input_ids": INPUTS["input_ids"], "attention_mask": torch.ones(3, 41)},
    "embeds": lambda: {"inputs_embeds": torch.randn(3, 41, 32), "attention_mask": MASK},
    "positions": lambda: INPUTS | {"position_ids": torch.arange(41).flip(0)[None]},
    "types": lambda: INPUTS | {"token_type_ids": INPUTS["input_ids"] % 2},
    "holes": lambda: INPUTS | {"attention_mask": MASK * (torch.arange(41) % 3 != 1)},
    "one-token": lambda: {"input_ids": INPUTS["input_ids"][:, :1]},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", ["v1-positions", "v2-positions", "electra-embedding"])
def test_arguments(name, arguments):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    inputs = ARGUMENTS[arguments]()
    assert_parity(theirs, ours, inputs)
    with torch.no_grad():
        got, expected = (first(model(**inputs)) for model in (ours, theirs))
    valid = inputs.get("attention_mask", torch.ones(got.shape[:2])).bool()
    torch.testing.assert_close(got[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs(name, output):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    assert_parity(theirs, ours, **{output: True})
    for model in (theirs, ours):  # Asked for by the config.
        setattr(model.config, output, True)
    with torch.no_grad():
        got, expected = (model(**INPUTS) for model in (ours, theirs))
        tuples = [model(**INPUTS, return_dict=False) for model in (ours, theirs)]
    assert got.keys() == expected.keys() and [len(x) for x in tuples] == [len(got)] * 2
    got, expected = (x[output.removeprefix("output_")] for x in (got, expected))
    assert type(got) is tuple and len(got) == len(expected) >= 3
    for mine, truth in zip(got, expected, strict=True):
        rows = [x.movedim(-2, 1)[MASK.bool()] for x in (mine, truth)]
        torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name):
    theirs = model_of(name).train()
    ours = accelerate(copy.deepcopy(theirs))
    # Not reentrant: transformers 4.57's default goes through norm_rel_ebd's graph twice.
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert_parity(theirs, ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_in_training_only(name):
    ours = accelerate(model_of(name, attention_probs_dropout_prob=0.3))
    assert torch.equal(first(ours(**INPUTS)), first(ours(**INPUTS)))
    ours.train()
    assert not torch.equal(first(ours(**INPUTS)), first(ours(**INPUTS)))


@pytest.mark.parametrize("name", DEBERTA)
def test_nothing_quadratic_is_built_for_a_2d_mask(name):
    ours = accelerate(model_of(name))
    seen = []
    attentions(ours)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True
    )
    ours(**INPUTS)
    assert any(isinstance(x, RelativePosition) for x in seen)
    assert max(x.dim() for x in seen[1:] if isinstance(x, torch.Tensor)) == 2


@pytest.mark.parametrize("name", DEBERTA)
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_masks_given_to_the_encoder(name, dims):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    pairs = MASK[:, None] * MASK[:, :, None] * torch.ones(41, 41, dtype=torch.long).tril()
    mask = {2: MASK, 3: pairs, 4: pairs[:, None]}[dims]
    hidden = torch.randn(3, 41, 32)
    got, expected = (first(model.encoder(hidden, mask)) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DEBERTA)
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


# ELECTRA where transformers' own attention runs


def decoder(**changes):
    config = ElectraConfig(**ELECTRA | {"is_decoder": True, "use_cache": True, **changes})
    return tiny.randomize(ElectraForCausalLM(config))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_decoder(training):
    theirs = decoder().train(training)
    ours = accelerate(copy.deepcopy(theirs))
    for inputs in (INPUTS, {"input_ids": INPUTS["input_ids"]}):
        got, expected = (model(**inputs, labels=inputs["input_ids"]) for model in (ours, theirs))
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.loss, expected.loss)
    bidirectional = accelerate(decoder(is_decoder=False))  # The control.
    assert (bidirectional(**INPUTS).logits - expected.logits).abs().max() > 0.1


def test_generation_with_a_cache():
    theirs = decoder()
    ours = accelerate(copy.deepcopy(theirs))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got, expected = (
        model.generate(INPUTS["input_ids"][:1, :7], **options) for model in (ours, theirs)
    )
    assert got.shape == (1, 12) and torch.equal(got, expected)


def test_cross_attention():
    theirs = decoder(add_cross_attention=True)
    ours = accelerate(copy.deepcopy(theirs))
    seen = {"encoder_hidden_states": torch.randn(3, 5, 32)}
    got, expected = (model(**INPUTS, **seen).logits for model in (ours, theirs))
    assert torch.equal(got, expected)
    assert not torch.equal(got, ours(**INPUTS).logits)


@pytest.mark.parametrize("kind", ["rows", "bias", "keys", "heads"])
@pytest.mark.parametrize("name", ["electra", "electra-sdpa"])
def test_masks_given_to_the_electra_encoder(name, kind):
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    lower = torch.finfo(torch.float32).min
    hidden = ~MASK[:, None, None].bool()
    mask = {
        "rows": torch.ones(41, 41).triu(1)[None, None].expand(3, 1, 41, 41) * lower,
        "bias": torch.randn(3, 1, 1, 41),
        "keys": (hidden * lower).expand(3, 1, 41, 41).contiguous(),
        "heads": torch.randn(3, 2, 1, 41),
    }[kind]
    x = torch.randn(3, 41, 32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, expected = (model.encoder(x, mask)[0] for model in (ours, theirs))
        rows = slice(None) if grad or kind != "keys" else MASK.bool()
        torch.testing.assert_close(got[rows], expected[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(IS_4, reason="ELECTRA of transformers 4.57 has eager attention only")
@pytest.mark.parametrize("name", ["eager", "sdpa", "elsewhere"])
def test_attention_implementations(name):
    """One that a user registered stays; ours takes the place of the two that are built in."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("elsewhere", counted)
    model = model_of("electra")
    expected = first(model(input_ids=INPUTS["input_ids"]))
    accelerate(model).config._attn_implementation = name
    got = first(model(input_ids=INPUTS["input_ids"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (3 if name == "elsewhere" else 0)


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


@pytest.mark.parametrize(
    "model",
    [
        RobertaModel(RobertaConfig(**tiny.SIZES)),
        nn.Linear(2, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_nothing_to_accelerate(model):
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"no DeBERTa or ELECTRA attention .* in {name}; expected"):
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
