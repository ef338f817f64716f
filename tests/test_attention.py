"""DisentangledAttention against transformers' own modules: same names, same numbers."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from closeness import assert_close
from torch import nn
from transformers import DebertaConfig, DebertaV2Config, ElectraConfig
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

from fastdeberta import RelativePosition
from fastdeberta.attention import DisentangledAttention

HIDDEN, SPAN = 32, 8
TERMS = (["c2p"], ["p2c"], ["c2p", "p2c"])
SHORT, LONG = 5, 41

# Right padding, left padding, holes, none, and a sequence without a token.
MASK = torch.zeros(5, LONG, dtype=torch.bool)
MASK[0, :23] = MASK[1, 9:] = MASK[2, ::3] = MASK[3] = True
SHORT_MASK = torch.tensor(
    [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
).bool()


def pairwise(mask):
    """The mask that transformers' encoders give their attention."""
    return mask[:, None, None, :] & mask[:, None, :, None]


def config_of(family, **changes):
    settings = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": SPAN,
    }
    if family == "v1":
        return DebertaConfig(**settings | changes)
    buckets = {"position_buckets": SPAN, "max_relative_positions": 2 * SPAN, "share_att_key": True}
    return DebertaV2Config(**settings | buckets | changes)


def pair(config):
    """transformers' module and ours with the same, not too small, weights."""
    theirs = (v1 if config.model_type == "deberta" else v2).DisentangledSelfAttention(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.25)
    ours = DisentangledAttention(config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def states(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def run(module, inputs, dtype=torch.float32, weights=None, **options):
    """Output and every gradient of `module` in `dtype`.

    inputs: hidden_states, and rel_embeddings and query_states where they are given.
    weights: the gradient of the output, where it is not the same everywhere.
    """
    module = copy.deepcopy(module).to(dtype)
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    out, probs = module(**leaves, **options)
    if weights is None:  # Scaled so that gradients of parameters, sums over tokens, are near one.
        weights = states(*out.shape) / out[..., 0].numel() ** 0.5
    out.backward(weights.to(dtype))
    results = {"out": out}
    if probs is not None:
        results["probs"] = probs
    for name, x in (*leaves.items(), *module.named_parameters()):
        results[f"d{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    return results


def assert_parity(theirs, ours, inputs, *, options, our_options=None, dtype=torch.float32):
    """Ours is as near to transformers in float64 as transformers in `dtype` is."""
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    theirs = theirs.to(dtype)
    truth = run(theirs, inputs, torch.float64, **options)
    peer = run(theirs, inputs, dtype, **options)
    mine = run(ours, inputs, dtype, **options if our_options is None else our_options)
    assert_close(mine, peer, truth, dtype)


def inputs_of(length, table_rows=2 * SPAN, batch=5):
    return {
        "hidden_states": states(batch, length, HIDDEN),
        "rel_embeddings": states(table_rows, HIDDEN),
    }


def linear_distances(length):
    return v1.build_relative_position(torch.empty(1, length, 1), torch.empty(1, length, 1))


# Parity


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize(
    ("terms", "shared", "buckets"), list(product([[], *TERMS], [True, False], [SPAN, -1]))
)
@pytest.mark.parametrize("pairs", [False, True], ids=["2d", "4d"])
def test_v2(terms, shared, buckets, length, pairs):
    config = config_of("v2", pos_att_type=terms, share_att_key=shared, position_buckets=buckets)
    mask = MASK if length == LONG else SHORT_MASK
    rows = 2 * SPAN if buckets > 0 else 4 * SPAN
    assert_parity(
        *pair(config),
        inputs_of(length, rows),
        options={"attention_mask": pairwise(mask)},
        our_options={"attention_mask": pairwise(mask) if pairs else mask},
    )


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("terms", [[], *TERMS, ["c2p", "p2c", "p2p"]], ids="-".join)
@pytest.mark.parametrize("pairs", [False, True], ids=["2d", "4d"])
def test_v1(terms, length, pairs):
    mask = MASK if length == LONG else SHORT_MASK
    distances = {"relative_pos": linear_distances(length)}
    assert_parity(
        *pair(config_of("v1", pos_att_type=terms)),
        inputs_of(length),
        options={"attention_mask": pairwise(mask), **distances},
        our_options={"attention_mask": pairwise(mask) if pairs else mask, **distances},
    )


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("relative", [True, False])
def test_without_relative_positions(family, relative):
    theirs, ours = pair(config_of(family, relative_attention=relative))
    inputs = {"hidden_states": states(5, LONG, HIDDEN)}
    if relative and family == "v2":
        with pytest.raises(ValueError, match="rel_embeddings must be"):
            ours(**inputs)
        return
    assert_parity(theirs, ours, inputs, options={"attention_mask": pairwise(MASK)})
    if family == "v1":  # Without distances v1 leaves both terms out, even with a table.
        inputs = inputs_of(LONG)
        del inputs["rel_embeddings"]
        assert_parity(theirs, ours, inputs, options={"attention_mask": pairwise(MASK)})


def test_v3_sizes():
    config = config_of("v2", position_buckets=256, max_relative_positions=-1)
    mask = torch.ones(1, 530).bool()
    assert_parity(
        *pair(config), inputs_of(530, 512, batch=1), options={"attention_mask": pairwise(mask)}
    )


def test_head_size_of_its_own():
    config = config_of("v2", attention_head_size=24)
    theirs, ours = pair(config)
    assert ours.all_head_size == 48
    assert_parity(theirs, ours, inputs_of(LONG), options={"attention_mask": pairwise(MASK)})


def test_half_precision():
    for dtype, family in product((torch.bfloat16, torch.float16), ("v1", "v2")):
        options = {"attention_mask": pairwise(MASK)}
        if family == "v1":
            options["relative_pos"] = linear_distances(LONG)
        assert_parity(*pair(config_of(family)), inputs_of(LONG), options=options, dtype=dtype)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_output_attentions(family):
    options = {"attention_mask": pairwise(MASK), "output_attentions": True}
    if family == "v1":
        options["relative_pos"] = linear_distances(LONG)
    theirs, ours = pair(config_of(family))
    assert_parity(theirs, ours, inputs_of(LONG), options=options)
    fused, nothing = ours(**inputs_of(LONG), **options | {"output_attentions": False})
    assert nothing is None
    torch.testing.assert_close(ours(**inputs_of(LONG), **options)[0], fused)


def test_talking_heads():
    config = config_of("v1", talking_head=True)
    options = {"attention_mask": pairwise(MASK), "relative_pos": linear_distances(LONG)}
    theirs, ours = pair(config)
    assert_parity(theirs, ours, inputs_of(LONG), options=options)
    assert_parity(theirs, ours, inputs_of(LONG), options=options | {"output_attentions": True})


# Masks and padding


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, LONG, LONG).tril(),
        pairwise(MASK).tril(),
        pairwise(MASK).float(),
        pairwise(MASK).long(),
        pairwise(MASK[3:4]),
        MASK[:, None, None, :],
        torch.arange(5 * 2 * LONG * LONG).view(5, 2, LONG, LONG) % 7 > 1,
        torch.arange(5 * LONG * LONG).view(5, 1, LONG, LONG) % 11 > 4,
    ],
    ids=["causal", "causal-padded", "float", "int", "broadcast", "keys", "by-head", "arbitrary"],
)
def test_other_masks(mask):
    assert_parity(*pair(config_of("v2")), inputs_of(LONG), options={"attention_mask": mask})


def test_3d_mask_is_pairwise():
    _, ours = pair(config_of("v2"))
    causal = MASK[:, None, :] & torch.ones(LONG, LONG).tril().bool()
    inputs = inputs_of(LONG)
    torch.testing.assert_close(
        ours(**inputs, attention_mask=causal)[0], ours(**inputs, attention_mask=causal[:, None])[0]
    )


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_no_mask_attends_to_all(family):
    _, ours = pair(config_of(family))
    inputs = inputs_of(LONG) | {"relative_pos": ours.relative_position}
    everything = torch.ones(5, LONG)
    assert torch.equal(ours(**inputs)[0], ours(**inputs, attention_mask=everything)[0])


@pytest.mark.parametrize("composed", [False, True], ids=["fused", "composed"])
def test_padded_rows(composed):
    _, ours = pair(config_of("v2"))
    options = {"attention_mask": pairwise(MASK), "output_attentions": composed}
    uniform, _ = ours(**inputs_of(LONG), **options)
    ours.padded_rows = "zeros"
    zeros, probs = ours(**inputs_of(LONG), **options)
    assert torch.equal(zeros[MASK], uniform[MASK])
    assert not zeros[~MASK].any() and uniform[~MASK].any(-1).all()
    if composed:
        assert torch.equal(probs.sum(-1)[:, 0] > 0, MASK)


def test_2d_mask_with_other_queries_masks_keys():
    _, ours = pair(config_of("v2"))
    inputs = inputs_of(LONG) | {"query_states": states(5, 7, HIDDEN)}
    got, _ = ours(**inputs, attention_mask=MASK)
    expected, _ = ours(**inputs, attention_mask=MASK[:, None, None, :].expand(-1, 1, 7, -1))
    assert torch.equal(got, expected)


# Packed input


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_packed_equals_padded(family):
    _, ours = pair(config_of(family))
    lengths = torch.tensor([LONG, 1, 0, 17, 30])
    mask = torch.arange(LONG) < lengths[:, None]
    inputs = inputs_of(LONG)
    weights = states(5, LONG, HIDDEN) * mask[..., None] / mask.sum() ** 0.5
    positions = {"relative_pos": ours.relative_position}
    padded = run(ours, inputs, weights=weights, attention_mask=mask, **positions)
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    for max_seqlen in (LONG, None):
        packed = run(
            ours,
            inputs | {"hidden_states": inputs["hidden_states"][mask]},
            weights=weights[mask],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            **positions,
        )
        for name, expected in padded.items():
            if name in ("out", "dhidden_states"):
                expected = expected[mask]
            torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5)


def test_packed_with_a_mask():
    _, ours = pair(config_of("v2"))
    table, hidden = states(2 * SPAN, HIDDEN), states(2, 9, HIDDEN)
    mask = torch.tensor([[1] * 7 + [0] * 2, [0, 1] + [1] * 7])
    got, _ = ours(
        hidden.flatten(0, 1),
        mask.flatten(),
        rel_embeddings=table,
        cu_seqlens=torch.tensor([0, 9, 18], dtype=torch.int32),
    )
    expected, _ = ours(hidden, mask, rel_embeddings=table)
    torch.testing.assert_close(got.view_as(expected), expected)


# Queries of their own


def as_v2(module):
    """A v1 module's weights in transformers' v2 module with linear positions."""
    config = config_of(
        "v2",
        position_buckets=-1,
        max_relative_positions=SPAN,
        share_att_key=False,
        pos_att_type=module.pos_att_type,
    )
    theirs = v2.DisentangledSelfAttention(config).eval()
    fused = module.in_proj.weight.detach().view(2, 3, HIDDEN // 2, HIDDEN)
    weights = {}
    for n, name in enumerate(("query", "key", "value")):
        weights[f"{name}_proj.weight"] = fused[:, n].reshape(HIDDEN, HIDDEN)
        bias = {"query": module.q_bias, "value": module.v_bias}.get(name, torch.zeros(HIDDEN))
        weights[f"{name}_proj.bias"] = bias
    if "c2p" in module.pos_att_type:
        weights["pos_key_proj.weight"] = module.pos_proj.weight
        weights["pos_key_proj.bias"] = torch.zeros(HIDDEN)
    if "p2c" in module.pos_att_type:
        weights["pos_query_proj.weight"] = module.pos_q_proj.weight
        weights["pos_query_proj.bias"] = module.pos_q_proj.bias
    theirs.load_state_dict(weights)
    return theirs


def assert_inputs_parity(theirs, ours, inputs, *, options, our_options):
    """Parity of the output and the inputs' gradients alone: parameters have other names."""
    runs = [
        run(theirs, inputs, torch.float64, **options),
        run(theirs, inputs, **options),
        run(ours, inputs, **our_options),
    ]
    names = ["out", *(f"d{name}" for name in inputs)]
    truth, peer, mine = ({name: results[name] for name in names} for results in runs)
    assert_close(mine, peer, truth, torch.float32)


def test_query_states_v2():
    inputs = inputs_of(LONG) | {"query_states": states(5, LONG, HIDDEN) + 1}
    assert_parity(*pair(config_of("v2")), inputs, options={"attention_mask": pairwise(MASK)})


@pytest.mark.parametrize("terms", TERMS, ids="-".join)
def test_query_states_v1(terms):
    """transformers' v1 raises here; its weights in a v2 module do not."""
    _, ours = pair(config_of("v1", pos_att_type=terms))
    inputs = inputs_of(LONG) | {"query_states": states(5, LONG, HIDDEN) + 1}
    options = {"attention_mask": pairwise(MASK)}
    distances = {"relative_pos": linear_distances(LONG)}
    assert_inputs_parity(
        as_v2(ours), ours, inputs, options=options, our_options=options | distances
    )


@pytest.mark.parametrize("query_length", [1, 7, 60])
@pytest.mark.parametrize("family", ["v1", "v2"])
def test_query_states_of_another_length(query_length, family):
    theirs, ours = pair(config_of(family, pos_att_type=["c2p"]))
    inputs = inputs_of(LONG) | {"query_states": states(5, query_length, HIDDEN)}
    mask = MASK[:, None, None, :].expand(-1, 1, query_length, -1)
    options = our_options = {"attention_mask": mask}
    if family == "v1":
        theirs = as_v2(ours)
        our_options = options | {"relative_pos": ours.relative_position}
    assert_inputs_parity(theirs, ours, inputs, options=options, our_options=our_options)


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_first_queries_alone_give_the_first_rows(family):
    """Also with p2c, where transformers raises for other lengths."""
    _, ours = pair(config_of(family))
    inputs = inputs_of(LONG) | {"relative_pos": ours.relative_position}
    everything, _ = ours(**inputs)
    first, _ = ours(**inputs, query_states=inputs["hidden_states"][:, :11])
    torch.testing.assert_close(first, everything[:, :11])


# Distances of the caller's own


def random_distances(*shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-3 * SPAN, 3 * SPAN, shape, generator=generator)


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize(
    ("family", "shape"),  # transformers' v2 takes one matrix for the whole batch.
    [("v1", shape) for shape in ("LL", "1LL", "11LL", "BLL", "B1LL")]
    + [("v2", shape) for shape in ("LL", "1LL", "11LL")],
)
def test_custom_distances(family, shape, length):
    sizes = {"B": 5, "1": 1, "L": length}
    mask = MASK if length == LONG else SHORT_MASK
    assert_parity(
        *pair(config_of(family)),
        inputs_of(length),
        options={
            "attention_mask": pairwise(mask),
            "relative_pos": random_distances(*(sizes[s] for s in shape)),
        },
    )


def test_custom_distances_by_example_v2():
    _, ours = pair(config_of("v2"))
    inputs, distances = inputs_of(LONG), random_distances(5, LONG, LONG)
    together, _ = ours(**inputs, relative_pos=distances, attention_mask=MASK)
    for n in range(5):
        alone, _ = ours(
            inputs["hidden_states"][n : n + 1],
            MASK[n : n + 1],
            rel_embeddings=inputs["rel_embeddings"],
            relative_pos=distances[n],
        )
        torch.testing.assert_close(alone[0], together[n])


@pytest.mark.parametrize("family", ["v1", "v2"])
def test_rule_stands_for_built_distances(family):
    _, ours = pair(config_of(family))
    rule = ours.relative_position
    position = torch.arange(LONG)
    built = rule.bucket(position[:, None] - position[None, :])
    inputs = inputs_of(LONG)
    expected, _ = ours(**inputs, attention_mask=MASK, relative_pos=built)
    for relative_pos in (rule, built[None], built[None, None], built.expand(5, -1, -1)):
        got, _ = ours(**inputs, attention_mask=MASK, relative_pos=relative_pos)
        assert torch.equal(got, expected)
    got, _ = ours(**inputs, attention_mask=MASK, relative_pos=rule, output_attentions=True)
    torch.testing.assert_close(got, expected)
    if family == "v2":
        assert torch.equal(ours(**inputs, attention_mask=MASK)[0], expected)


@pytest.mark.parametrize("composed", [False, True], ids=["fused", "composed"])
def test_a_given_rule_is_obeyed(composed):
    theirs, ours = pair(config_of("v2"))
    rule = RelativePosition(SPAN, SPAN, 2 * SPAN, clip_distance=True)
    position = torch.arange(LONG)
    distance = position[:, None] - position[None, :]
    inputs, mask = inputs_of(LONG), {"attention_mask": pairwise(MASK)}
    expected, _ = theirs(**inputs, **mask, relative_pos=rule.bucket(distance))
    got, _ = ours(**inputs, **mask, relative_pos=rule, output_attentions=composed)
    torch.testing.assert_close(got, expected)
    assert (got - ours(**inputs, **mask)[0]).abs().max() > 1e-2


# Dropout and modes


@pytest.mark.parametrize("composed", [False, True], ids=["fused", "composed"])
def test_attention_dropout_only_in_training(composed):
    _, ours = pair(config_of("v2", attention_probs_dropout_prob=0.3))
    inputs = inputs_of(9, batch=1)
    call = partial(ours, **inputs, output_attentions=composed)
    expected, _ = call()
    assert torch.equal(call()[0], expected)
    ours.train()
    draws = torch.stack([call()[0] for _ in range(600)])
    assert not torch.equal(draws[0], draws[1])
    deviation = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() < 5 * deviation + 1e-6).all()
    # Var of one probability's contribution: p/(1-p) * (prob * value)^2, summed over keys.
    _, probs = ours.eval()(**inputs, output_attentions=True)
    value = ours.value_proj(inputs["hidden_states"]).view(1, 9, 2, -1).transpose(1, 2)
    variance = (0.3 / 0.7 * probs.square() @ value.square()).transpose(1, 2).flatten(2)
    ratio = draws.var(0).mean() / variance.mean()
    assert 0.9 < ratio < 1.1


def test_position_dropout_only_in_training():
    _, ours = pair(config_of("v2", hidden_dropout_prob=0.5))
    inputs = inputs_of(9)
    assert torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    ours.train()
    assert not torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    torch.manual_seed(0)
    dropped = nn.functional.dropout(inputs["rel_embeddings"], 0.5)
    torch.manual_seed(0)
    got, _ = ours(**inputs)
    inputs["rel_embeddings"] = dropped  # One dropped table serves c2p and p2c.
    assert torch.equal(got, ours.eval()(**inputs)[0])


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", ["2d", "4d", "packed"])
def test_compile(family, training, form):
    dropout = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1}
    _, ours = pair(config_of(family, **dropout if training else {}))
    ours.train(training)
    inputs, options = inputs_of(LONG), {"relative_pos": ours.relative_position}
    if form == "packed":
        inputs["hidden_states"] = inputs["hidden_states"].flatten(0, 1)
        options["cu_seqlens"] = torch.tensor([0, 100, 205], dtype=torch.int32)
        options["max_seqlen"] = 105
    else:
        options["attention_mask"] = MASK if form == "2d" else pairwise(MASK)
    torch._dynamo.reset()
    module = torch.compile(ours, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in inputs.values()]
    results = []
    for function in (module, ours):
        torch.manual_seed(0)
        out, _ = function(**inputs, **options)
        grads = torch.autograd.grad(out.square().sum(), [*leaves, *ours.parameters()])
        results.append((out, *grads))
    if form == "4d":  # The compiled module is composed, and draws another dropout.
        results = [r for r in results if not training]
    if results:
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_distances_are_composed():
    """A matrix cannot be recognised in a graph; it gives the same all the same."""
    _, ours = pair(config_of("v2"))
    distances = v2.build_relative_position(*[torch.empty(1, LONG, 1)] * 2, SPAN, 2 * SPAN)
    inputs = inputs_of(LONG) | {"attention_mask": MASK, "relative_pos": distances}
    torch._dynamo.reset()
    got, _ = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(got, ours(**inputs)[0])


def test_autocast():
    _, ours = pair(config_of("v2"))
    inputs = inputs_of(LONG) | {"attention_mask": MASK}
    expected, _ = ours(**inputs)
    for composed in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, _ = ours(**inputs, output_attentions=composed)
        assert got.dtype == torch.bfloat16
        assert (got - expected).abs().max() < 0.1


def test_electra_config_gives_plain_attention():
    config = ElectraConfig(hidden_size=HIDDEN, num_attention_heads=2)
    ours = DisentangledAttention(config).eval()
    hidden = states(5, LONG, HIDDEN)
    assert sorted(ours.state_dict()) == sorted(
        f"{name}_proj.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")
    )
    query, key, value = (
        projection(hidden).view(5, LONG, 2, -1).transpose(1, 2)
        for projection in (ours.query_proj, ours.key_proj, ours.value_proj)
    )
    expected = nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ours(hidden)[0], expected.transpose(1, 2).flatten(2))


def test_pos_att_type_as_checkpoints_write_it():
    config = config_of("v2")
    for terms in ("p2c|c2p", " P2C | c2p ", ["p2c", "c2p"]):
        config.pos_att_type = terms
        assert DisentangledAttention(config).pos_att_type == ["p2c", "c2p"]


# Errors


def constructor(**changes):
    config = config_of("v2")
    for name, value in changes.items():
        setattr(config, name, value)
    return lambda: DisentangledAttention(config)


def forward(family="v2", padded=True, config=(), **changes):
    def call():
        module = DisentangledAttention(config_of(family, **dict(config)))
        inputs = inputs_of(9) | {"relative_pos": RelativePosition(SPAN, SPAN, 2 * SPAN)}
        if not padded:
            inputs["hidden_states"] = inputs["hidden_states"].flatten(0, 1)
            inputs["cu_seqlens"] = torch.tensor([0, 45], dtype=torch.int32)
        module(**inputs | changes)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (constructor(num_attention_heads=5), r"hidden_size must be a multiple .*\(5\), got 32"),
        (constructor(pos_att_type=["c2p", "p2x"]), r"pos_att_type may hold .*; got \['p2x'\]"),
        (constructor(position_buckets=9), "buckets must be None .* got 9"),
        (forward(rel_embeddings=None), "rel_embeddings must be .* got None"),
        (
            forward(rel_embeddings=torch.zeros(15, HIDDEN)),
            r"rel_embeddings must be \[2 \* span = 16, hidden\], got \[15, 32\]",
        ),
        (forward(rel_embeddings=torch.zeros(1, 16, HIDDEN)), r"rel_embeddings must be .*\[1, 16"),
        (
            forward(relative_pos=torch.zeros(9)),
            r"relative_pos must have 2, 3 or 4 dimensions, got \[9\]",
        ),
        (forward(relative_pos=RelativePosition()), "relative_pos must have the table's span 8"),
        (
            forward(attention_mask=torch.ones(9)),
            r"attention_mask must have 2, 3 or 4 dimensions, got \[9\]",
        ),
        (
            forward(padded=False, output_attentions=True),
            "cu_seqlens cannot be combined with output_attentions or talking heads",
        ),
        (
            forward("v1", False, {"talking_head": True}),
            "cu_seqlens cannot be combined with output_attentions or talking heads",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_backend():
    module = DisentangledAttention(config_of("v2"))
    module.backend = "nope"
    with pytest.raises(ValueError, match="backend must be one of .*'nope'"):
        module(**inputs_of(9))
