"""The CPU's fast path of whole encoders: the same numbers, and the ordinary path where it must be.

What it is compared with is the same model with gradients, which runs as modules.
"""

import copy
import gc
import io
import pickle
from functools import partial

import pytest
import tiny
import torch
from closeness import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
)

from fastdeberta import accelerate, restore
from fastdeberta.inference import PackedLinear
from fastdeberta.models import Model

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)

LONG = 41
V1 = tiny.SIZES | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}


def v1(**changes):
    return accelerate(tiny.randomize(DebertaModel(DebertaConfig(**V1 | changes))))


def v2(**changes):
    return accelerate(tiny.randomize(DebertaV2Model(DebertaV2Config(**tiny.DEBERTA | changes))))


def electra(**changes):
    return accelerate(tiny.randomize(ElectraModel(ElectraConfig(**tiny.ELECTRA | changes))))


def ours(family="deberta-v2", head="base", **changes):
    return tiny.randomize(Model(tiny.config(family, **changes), head))


MODELS = {
    "v1": v1,
    "v1-c2p": lambda: v1(pos_att_type=["c2p"], hidden_act="gelu_new"),
    "v2-conv": lambda: v2(conv_kernel_size=3),
    "v2-linear": lambda: v2(position_buckets=-1, share_att_key=False, hidden_act="silu"),
    "v2-c2c": lambda: v2(relative_attention=False, hidden_act="mish"),
    "v3": v2,
    "electra": electra,
    "electra-eager": lambda: electra(attn_implementation="eager", hidden_act="relu"),
    "ours-v3": ours,
    "ours-p2c": lambda: ours(pos_att_type=["p2c"], share_att_key=False, hidden_act="gelu_new"),
    "ours-conv": lambda: ours(conv_kernel_size=3, hidden_act="relu"),
    "ours-electra": lambda: ours("electra"),
}
FEW = ["v1", "v3", "electra", "ours-v3"]


def masks():
    """Name -> [4, 41]; "none" stands for no mask at all."""
    position = torch.arange(LONG)
    lengths = torch.tensor([[41], [23], [7], [1]])
    right = position < lengths
    holes = right.clone()
    holes[0, 5:30:3] = holes[1, :4] = holes[2, 2] = False
    empty = right.clone()
    empty[1] = empty[3] = False
    return {
        "none": None,
        "ones": right | True,
        "right": right,
        "left": right.flip(1),
        "holes": holes,
        "empty": empty,
        "all-empty": right & False,
        "only-holes": (position % 2 == 0).expand(4, -1),
    }


MASKS = masks()


def inputs_of(mask=None, dtype=torch.long):
    inputs = {"input_ids": tiny.token_ids(4, LONG)}
    return inputs if mask is None else inputs | {"attention_mask": mask.to(dtype)}


RIGHT = inputs_of(MASKS["right"])


def fast(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def last(output):
    return output.last_hidden_state.detach()


def encoder_of(model):
    return model.backbone.encoder if isinstance(model, Model) else model.encoder


def packed_linears():
    gc.collect()
    return sum(type(x) is PackedLinear for x in gc.get_objects())


class Ops(TorchDispatchMode):
    """Names of the operators that run, and shape and dtype of what they return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self.seen.append((func.name(), tuple(x.shape), x.dtype))
            elif isinstance(x, torch.Tensor):  # oneDNN's own layout.
                self.seen.append((func.name(), (), x.dtype))
        return out

    def packed(self):
        return sum("reorder_linear_weight" in name for name, *_ in self.seen)

    def products(self):
        return [shape for name, shape, _ in self.seen if name.startswith("mkldnn::_linear")]


def ops_of(model, inputs, **options):
    with Ops() as ops:
        fast(model, inputs, **options)
    return ops


def is_fast(model, inputs=RIGHT, **options):
    """Whether the encoder runs on packed weights. Its modules run under torch's own products."""
    fast(model, inputs, **options)  # The first call also packs.
    return bool(ops_of(model, inputs, **options).products())


def assert_parity(model, inputs, dtype=torch.float32):
    """The valid rows of the fast path are as near to the truth as those of the ordinary one."""
    model = copy.deepcopy(model).to(dtype)
    mask = inputs.get("attention_mask", torch.ones(4, LONG)).bool()
    truth = last(copy.deepcopy(model).double()(**inputs))[mask]
    peer, mine = last(model(**inputs))[mask], last(fast(model, inputs))
    assert mine.dtype == dtype and type(mine) is torch.Tensor and mine.is_contiguous()
    assert_close({"out": mine[mask]}, {"out": peer}, {"out": truth}, dtype)
    assert not mine[~mask].any()


# The same numbers


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name, mask):
    assert_parity(MODELS[name](), inputs_of(MASKS[mask]))


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_in_bfloat16(name, mask):
    assert_parity(MODELS[name](), inputs_of(MASKS[mask]), torch.bfloat16)


@pytest.mark.parametrize("name", FEW)
def test_parity_notices_a_small_error(name):
    """The negative control: the fast path keeps a copy that the ordinary path does not read."""
    model = MODELS[name]()
    fast(model, RIGHT)
    parameter = encoder_of(model).layer[1].output.dense.weight
    parameter.data[0, 0] += 1e-3  # Unseen, as documented.
    mask = RIGHT["attention_mask"].bool()
    truth, peer, mine = (
        {"out": last(out)[mask]}
        for out in (copy.deepcopy(model).double()(**RIGHT), model(**RIGHT), fast(model, RIGHT))
    )
    with pytest.raises(AssertionError, match="out: max error"):
        assert_close(mine, peer, truth, torch.float32)


@needs_onednn
@pytest.mark.parametrize("mask", ["none", "ones", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_is_the_fast_path(name, mask):
    assert is_fast(MODELS[name](), inputs_of(MASKS[mask]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", FEW)
def test_types_of_mask(name, dtype):
    model = MODELS[name]()
    assert torch.equal(
        last(fast(model, inputs_of(MASKS["holes"], dtype))),
        last(fast(model, inputs_of(MASKS["holes"]))),
    )


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(name, mask):
    model, inputs = MODELS[name](), inputs_of(MASKS[mask])
    expected = model(**inputs, output_hidden_states=True).hidden_states
    output = fast(model, inputs, output_hidden_states=True)
    assert isinstance(output.hidden_states, (tuple, list))
    assert output.hidden_states[-1] is output.last_hidden_state
    assert fast(model, inputs).hidden_states is None
    valid = inputs.get("attention_mask", torch.ones(4, LONG)).bool()
    for mine, theirs in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(mine[valid], theirs[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_states", [False, True])
@pytest.mark.parametrize("name", ["v1", "v3", "electra"])
def test_tuples(name, hidden_states):
    options = {"output_hidden_states": hidden_states, "return_dict": False}
    model = MODELS[name]()
    expected, got = model(**RIGHT, **options), fast(model, RIGHT, **options)
    assert type(got) is tuple and len(got) == len(expected)
    if hidden_states:
        assert type(got[1]) is tuple and len(got[1]) == len(expected[1])


def test_states_of_an_encoder_can_be_sliced():
    model = v2()
    with torch.no_grad():
        states = model.encoder(torch.randn(4, LONG, 32), MASKS["right"]).hidden_states
    assert len(states) == 4 and len(states[-2:]) == 2 and len(list(states)) == 4
    assert states[-1] is states[3] is states[2:][1]
    with pytest.raises(IndexError):
        states[4]


def test_packed_sequences():
    model, mask = ours(), MASKS["right"]
    packed = {
        "input_ids": RIGHT["input_ids"][mask],
        "cu_seqlens": torch.tensor([0, *mask.sum(1).cumsum(0)], dtype=torch.int32),
    }
    expected = last(fast(model, RIGHT))[mask]
    torch.testing.assert_close(last(fast(model, packed)), expected, rtol=1e-4, atol=1e-5)


def test_head_of_transformers():
    model = tiny.randomize(DebertaForSequenceClassification(DebertaConfig(**V1)))
    expected = model(**RIGHT).logits
    got = fast(accelerate(model), RIGHT).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# What makes it fast


@needs_onednn
@pytest.mark.parametrize("name", MODELS)
def test_one_product_for_query_key_and_value(name):
    model = MODELS[name]()
    fast(model, RIGHT)
    tokens = int(MASKS["right"].sum())
    layer = [(tokens, 96), (tokens, 32), (tokens, 48), (tokens, 32)]
    assert ops_of(model, RIGHT).products() == layer * 3


@needs_onednn
def test_positions_are_projected_once():
    model = v2(share_att_key=False)
    position = {"fastdeberta::forward", "aten::addmm", "aten::mm", "aten::linear"}
    fast(model, RIGHT)
    names = [name for name, *_ in ops_of(model, RIGHT).seen if name in position]
    assert set(names) == {"fastdeberta::forward"}
    with Ops() as ops:
        model(**RIGHT)  # The control: as modules.
    assert "aten::addmm" in {name for name, *_ in ops.seen}


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("name", ["v1", "v3", "ours-v3"])  # ELECTRA has built its mask before.
def test_nothing_quadratic(name, mask):
    model = MODELS[name]()
    # Every mask's longest sequence is whole. The op itself is not looked into.
    quadratic = [
        (op, shape, dtype)
        for op, shape, dtype in ops_of(model, inputs_of(MASKS[mask])).seen
        if shape.count(LONG) > 1
    ]
    assert quadratic == []


def test_transformers_does_build_something_quadratic():
    """The control of the test above."""
    seen = ops_of(restore(v2()), RIGHT).seen
    assert any(shape.count(LONG) > 1 and dtype == torch.long for _, shape, dtype in seen)


# Weights that change


def step(model, optimizer, training=True):
    model.train(training)
    last_hidden = model(**RIGHT).last_hidden_state
    last_hidden.square().mean().backward()
    optimizer(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.eval()


def changed_state(model):
    return {name: x + 0.1 * torch.randn_like(x) for name, x in model.state_dict().items()}


def replace_parameter(model):
    dense = encoder_of(model).layer[0].intermediate.dense
    dense.weight = nn.Parameter(dense.weight + 0.1)


def replace_module(model):
    attention = encoder_of(model).layer[2].attention
    attention.output.dense = nn.Linear(32, 32).eval()


def replace_layer(model):
    layers = encoder_of(model).layer
    layers[0] = copy.deepcopy(layers[1])


def write_table(model):
    with torch.no_grad():
        encoder_of(model).rel_embeddings.weight.neg_()


def write_norm(model):
    with torch.no_grad():
        encoder_of(model).layer[1].output.LayerNorm.weight.mul_(2)


CHANGES = {
    "sgd": lambda m: step(m, torch.optim.SGD),
    "fused": lambda m: step(m, partial(torch.optim.AdamW, fused=True)),
    # Whose writes autograd does not count, and no call in training mode comes before.
    "fused-in-eval-mode": lambda m: step(m, partial(torch.optim.AdamW, fused=True), False),
    "detached": lambda m: encoder_of(m).layer[0].output.dense.weight.detach()[0].mul_(2),
    "data": lambda m: encoder_of(m).layer[0].output.dense.weight.data.mul_(2),
    "load": lambda m: m.load_state_dict(changed_state(m)),
    "load-assign": lambda m: m.load_state_dict(changed_state(m), assign=True),
    "parameter": replace_parameter,
    "module": replace_module,
    "layer": replace_layer,
    "fewer-layers": lambda m: encoder_of(m).layer.pop(-1),
    "table": write_table,
    "norm": write_norm,
    "bfloat16-and-back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(n, c) for n in FEW for c in CHANGES if (n, c) != ("electra", "table")],  # It has none.
)
def test_follows_the_weights(name, change):
    model = MODELS[name]()
    before = last(fast(model, RIGHT))
    CHANGES[change](model)
    assert_parity(model, RIGHT)
    mask = RIGHT["attention_mask"].bool()
    after = last(fast(model, RIGHT))
    assert (after - before)[mask].abs().max() > 1e-3
    torch.testing.assert_close(after[mask], last(model(**RIGHT))[mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FEW)
def test_follows_the_dtype(name):
    model = MODELS[name]()
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
        assert last(fast(model.to(dtype), RIGHT)).dtype == dtype
        expected = last(model(**RIGHT))
        mask = RIGHT["attention_mask"].bool()
        close = {"rtol": 0, "atol": 0.2 if dtype.itemsize == 2 else 1e-4}
        torch.testing.assert_close(last(fast(model, RIGHT))[mask], expected[mask], **close)


@needs_onednn
@pytest.mark.parametrize("name", FEW)
def test_packs_once(name):
    model = MODELS[name]()
    with torch.no_grad(), Ops() as ops:
        model(**RIGHT)
        packed = ops.packed()
        model(**inputs_of(MASKS["none"]))
        with torch.enable_grad():
            model(**RIGHT)
        model(**RIGHT)
    assert packed == ops.packed() == 3 * 4


@pytest.mark.parametrize("name", FEW)
def test_unseen_writes_after_accelerate(name):
    """What a write through .data needs, as the docstring says."""
    model = MODELS[name]()
    fast(model, RIGHT)
    encoder_of(model).layer[1].output.dense.weight.data[0].mul_(2)
    assert_parity(accelerate(model), RIGHT)


@pytest.mark.parametrize("name", FEW)
def test_training_releases_the_copies(name):
    before = packed_linears()
    model = MODELS[name]()
    fast(model, RIGHT)
    assert packed_linears() == before + 3 * 4
    model.train()
    model(**RIGHT)
    assert packed_linears() == before


# Where modules must run


class Double(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(model):
    dense = encoder_of(model).layer[1].intermediate.dense
    dense.__class__ = Double


def subclass_around_known_parts(model):
    output = encoder_of(model).layer[1].output
    kind = type(output)
    double = {"forward": lambda self, *args: 2 * kind.forward(self, *args)}
    output.__class__ = type("Output", (kind,), double)


def own_forward(model):
    dense = encoder_of(model).layer[1].intermediate.dense
    dense.forward = lambda x: 2 * nn.Linear.forward(dense, x)


def hook(model):
    encoder_of(model).layer[1].register_forward_pre_hook(lambda module, args: None)


def adapter(model):
    output = encoder_of(model).layer[1].output
    output.dense = nn.Sequential(output.dense, nn.Linear(32, 32)).eval()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(encoder_of(model).layer[0].attention.output.dense)


def dropout(model):
    model.eval()
    next(m for m in encoder_of(model).modules() if isinstance(m, nn.Dropout)).train()


def switched_off(model):
    accelerate(model, inference=False)


MODULES_ONLY = (
    subclass,
    subclass_around_known_parts,
    own_forward,
    hook,
    adapter,
    parametrized,
    dropout,
    switched_off,
)


@needs_onednn
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("change", MODULES_ONLY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FEW)
def test_models_whose_modules_run(name, change, prepared):
    model = MODELS[name]()
    if prepared:
        assert is_fast(model)
    change(model)
    assert not is_fast(model)
    assert torch.equal(last(fast(model, RIGHT)), last(model(**RIGHT)))


@needs_onednn
@pytest.mark.parametrize("name", FEW)
def test_calls_for_which_modules_run(name):
    model = MODELS[name]()
    assert is_fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast(model)
        assert torch.equal(last(fast(model, RIGHT)), last(model(**RIGHT)))
    assert not is_fast(model.double())
    assert not is_fast(model.float().train())
    assert is_fast(model.eval())


@needs_onednn
def test_recorders_that_transformers_leaves_behind():
    """In transformers 5, hooks of ELECTRA's layers record states, and stay where they are."""
    model = electra(attn_implementation="eager")
    for output in ("hidden_states", "attentions"):
        assert not is_fast(model, **{f"output_{output}": True})
        assert len(fast(model, RIGHT, **{f"output_{output}": True})[output]) >= 3
    assert is_fast(model)
    encoder_of(model).layer[1].register_forward_hook(lambda module, args, output: output)
    assert not is_fast(model)


@needs_onednn
@pytest.mark.parametrize("name", ["v3", "ours-v3"])
def test_norms_of_another_dtype(name):
    model = MODELS[name]().bfloat16()
    assert is_fast(model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    assert not is_fast(model)
    assert torch.equal(last(fast(model, RIGHT)), last(model(**RIGHT)))


def test_input_of_another_dtype():
    model, mask = v2(), MASKS["right"]
    fast(model, RIGHT)
    for _ in ("prepared", "not prepared"):
        with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
            model.encoder(torch.randn(4, LONG, 32).bfloat16(), mask)
        model.encoder.layer.pop(-1)


def test_talking_heads():
    model = v1(talking_head=True)
    assert torch.equal(last(fast(model, RIGHT)), last(model(**RIGHT)))


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_arguments_that_need_modules(name):
    model = MODELS[name]()
    attentions = fast(model, RIGHT, output_attentions=True).attentions
    assert len(attentions) == 3 and attentions[0].shape == (4, 2, LONG, LONG)
    hidden, mask = torch.randn(4, LONG, 32), MASKS["right"].long()
    pairs = mask[:, None] * mask[:, :, None] * torch.ones(LONG, LONG, dtype=torch.long).tril()
    distances = torch.arange(LONG)[:, None] - torch.arange(LONG)[None]
    calls = [
        {"attention_mask": pairs},
        {"attention_mask": mask, "relative_pos": distances // 2},
        {"attention_mask": mask, "output_attentions": True},
    ]
    if name == "v3":  # Of v1, transformers' own code for other queries takes no batch.
        calls.append({"attention_mask": mask, "query_states": torch.randn(4, LONG, 32)})
    for call in calls:
        expected = model.encoder(hidden, **call)[0].detach()
        with torch.no_grad():
            assert torch.equal(model.encoder(hidden, **call)[0], expected)


@pytest.mark.parametrize("name", FEW)
def test_gradients_flow(name):
    model = MODELS[name]()
    fast(model, RIGHT)
    model(**RIGHT).last_hidden_state.sum().backward()
    weight = encoder_of(model).layer[0].intermediate.dense.weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", FEW)
def test_inference_mode(name):
    """What it prepares serves every later call, and what another call prepared serves it."""
    expected = last(MODELS[name]()(**RIGHT))[MASKS["right"]]
    for modes in (["inference_mode", "no_grad"], ["no_grad", "inference_mode"]):
        model = MODELS[name]()
        for mode in modes:
            with getattr(torch, mode)():
                out = model(**RIGHT).last_hidden_state
            torch.testing.assert_close(out[MASKS["right"]], expected, rtol=1e-4, atol=1e-5)
        model(**RIGHT).last_hidden_state.sum().backward()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = v2()
        got = model(**RIGHT).last_hidden_state
    expected = last(fast(v2(), RIGHT))
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FEW)
def test_compiled(name):
    model, mask = MODELS[name](), MASKS["right"]
    expected = last(model(**RIGHT))[mask]
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        got = last(fast(compiled, RIGHT))[mask]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        fast(model, RIGHT)  # In between: the uncompiled model prepares.


# What stays as it was


@pytest.mark.parametrize("name", FEW)
def test_parameters_are_untouched(name):
    model = MODELS[name]()
    parameters = dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    fast(model, RIGHT)
    assert all(p is parameters[n] and p.requires_grad for n, p in model.named_parameters())
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(x, values[n]) for n, x in model.state_dict().items())


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("clone", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("name", FEW)
def test_copies_have_their_own_weights(name, clone):
    model = MODELS[name]()
    size = len(pickle.dumps(model))
    expected = last(fast(model, RIGHT))
    assert len(pickle.dumps(model)) == size
    twin = clone(model)
    assert torch.equal(last(fast(twin, RIGHT)), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not last(fast(twin, RIGHT)).any()
    assert torch.equal(last(fast(model, RIGHT)), expected)


def test_saved_as_a_whole():
    model, file = ours(), io.BytesIO()
    expected = last(fast(model, RIGHT))
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(last(fast(torch.load(file, weights_only=False), RIGHT)), expected)


def test_save_pretrained(tmp_path):
    model = v2()
    expected = last(fast(model, RIGHT))
    model.save_pretrained(tmp_path)
    again = accelerate(DebertaV2Model.from_pretrained(tmp_path).eval())
    assert torch.equal(last(fast(again, RIGHT)), expected)


@pytest.mark.parametrize("name", ["v1", "v3", "electra"])
def test_restore(name):
    model = MODELS[name]()
    fast(model, RIGHT)
    before = packed_linears()
    restore(model)
    assert packed_linears() == before - 3 * 4
    assert not model._forward_hooks and "forward" not in model.encoder.__dict__
    assert torch.equal(last(fast(model, RIGHT)), last(model(**RIGHT)))


@pytest.mark.parametrize("name", ["v1", "v3", "electra"])
def test_without_inference_padding_is_as_transformers_has_it(name):
    model = accelerate(MODELS[name](), inference=False)
    got = last(fast(model, RIGHT))
    expected = last(fast(restore(model), RIGHT))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got[~MASKS["right"]].abs().min(-1).values.max() > 0


@needs_onednn
@pytest.mark.parametrize("name", FEW)
def test_switching(name):
    model = MODELS[name]()
    for inference in (False, True, True, False, True):
        accelerate(model, inference=inference)
        assert is_fast(model) == inference
    assert len(model._forward_hooks) == (name in ("v1", "v3"))


# The packed product

ACTIVATIONS = {
    "none": None,
    "gelu": nn.functional.gelu,
    "tanh-gelu": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "softplus": nn.functional.softplus,
    "clipped": lambda x: nn.functional.gelu(x).clamp(max=10),
}
FUSED = {"none", "gelu", "tanh-gelu", "relu", "silu", "tanh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_packed_linear(name, onednn, dtype, monkeypatch):
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    activation = ACTIVATIONS[name]
    x, weight, bias = (5 * torch.randn(*size).to(dtype) for size in ((7, 32), (48, 32), (48,)))
    linear = PackedLinear(weight, bias, activation)

    def plain(dtype):
        out = nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return {"out": out if activation is None else activation(out)}

    # Sums of 32 products of numbers near five: bring them to the size that the rule is for.
    truth, peer, mine = (
        {"out": out["out"] / 100}
        for out in (plain(torch.float64), plain(dtype), {"out": linear(x)})
    )
    assert_close(mine, peer, truth, dtype)
    if onednn and torch.backends.mkldnn.is_available():
        assert (linear.activation is None) == (name in FUSED)


@needs_onednn
@pytest.mark.parametrize("name", FEW)
def test_without_onednn(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_parity(MODELS[name](), RIGHT)
