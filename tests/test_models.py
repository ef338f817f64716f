"""Our models against transformers': same weights, same numbers, same gradients."""

import copy

import pytest
import tiny
import torch
import transformers
from closeness import assert_close
from torch import nn
from transformers import DebertaConfig, DebertaV2Config, ElectraConfig

from fastdeberta.models import Config, Model, deberta, electra, from_pretrained
from fastdeberta.models.encoder import activation

LENGTHS = torch.tensor([41, 23, 1])
LONG = 41

V1 = {
    "v1": {},
    "far": {"max_relative_positions": -1},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "p2p-in-the-scale": {"pos_att_type": "c2p|p2c|p2p"},
    "talking-heads": {"talking_head": True},
    "c2c": {"relative_attention": False, "pos_att_type": [], "position_biased_input": True},
    "types-and-positions": {"type_vocab_size": 2, "position_biased_input": True},
    "norm-is-v2s": {"norm_rel_ebd": "layer_norm"},
}
V2 = {
    "v3": {},
    "linear": {"position_buckets": -1},
    "no-limit": {"position_buckets": -1, "max_relative_positions": -1},
    "own-projections": {"share_att_key": False},
    "plain-table": {"norm_rel_ebd": "none"},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c", "share_att_key": False},
    "c2c": {"relative_attention": False, "pos_att_type": [], "position_biased_input": True},
    "conv": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "grouped-conv": {"conv_kernel_size": 5, "conv_groups": 4},
    "types-and-positions": {"type_vocab_size": 2, "position_biased_input": True},
    "narrow-embedding": {"embedding_size": 20, "type_vocab_size": 2},
    "gelu-new": {"hidden_act": "gelu_new"},
}
ELECTRAS = {"projected": {}, "plain": {"embedding_size": 32}, "relu": {"hidden_act": "relu"}}

BASE = [("DebertaModel", "base", name, changes) for name, changes in V1.items()]
BASE += [("DebertaV2Model", "base", name, changes) for name, changes in V2.items()]
BASE += [("ElectraModel", "base", name, changes) for name, changes in ELECTRAS.items()]

THREE = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
ONE = {"id2label": {0: "score"}, "label2id": {"score": 0}}
SEVERAL = THREE | {"problem_type": "multi_label_classification"}
HEADS = [
    ("DebertaForMaskedLM", "mlm", "mlm", {}),
    ("DebertaForMaskedLM", "mlm", "legacy", {"legacy": True}),
    ("DebertaForSequenceClassification", "sequence", "classes", THREE),
    ("DebertaForSequenceClassification", "sequence", "regression", ONE),
    ("DebertaForTokenClassification", "token", "tags", THREE),
    ("DebertaForQuestionAnswering", "span", "span", {}),
    ("DebertaV2ForMaskedLM", "mlm", "mlm", {}),
    ("DebertaV2ForMaskedLM", "mlm", "legacy", {"legacy": True}),
    ("DebertaV2ForMaskedLM", "mlm", "legacy-narrow", {"legacy": True, "embedding_size": 20}),
    ("DebertaV2ForSequenceClassification", "sequence", "classes", THREE),
    ("DebertaV2ForSequenceClassification", "sequence", "tanh", {"pooler_hidden_act": "tanh"}),
    ("DebertaV2ForSequenceClassification", "sequence", "regression", ONE),
    ("DebertaV2ForSequenceClassification", "sequence", "several", SEVERAL),
    ("DebertaV2ForTokenClassification", "token", "tags", THREE),
    ("DebertaV2ForQuestionAnswering", "span", "span", {}),
    ("DebertaV2ForMultipleChoice", "choice", "choice", {}),
    ("ElectraForMaskedLM", "mlm", "mlm", {"hidden_act": "relu"}),
    ("ElectraForPreTraining", "rtd", "rtd", {"hidden_act": "relu"}),
    ("ElectraForCausalLM", "causal", "causal", {"is_decoder": True}),
    ("ElectraForSequenceClassification", "sequence", "classes", THREE),
    ("ElectraForSequenceClassification", "sequence", "regression", ONE),
    ("ElectraForTokenClassification", "token", "tags", THREE),
    ("ElectraForQuestionAnswering", "span", "span", {}),
    ("ElectraForMultipleChoice", "choice", "choice", {"summary_activation": "tanh"}),
]


IDS_OF_BASE, IDS_OF_HEADS = ([f"{c[0]}-{c[2]}" for c in cases] for cases in (BASE, HEADS))


FAMILIES = {
    "DebertaV2": (DebertaV2Config, tiny.DEBERTA),
    "Deberta": (DebertaConfig, tiny.DEBERTA_V1),
    "Electra": (ElectraConfig, tiny.ELECTRA),
}


def theirs(name, changes):
    """A transformers model with weights that matter."""
    kind, values = next(v for family, v in FAMILIES.items() if name.startswith(family))
    model = getattr(transformers, name)(kind(**values | changes))
    return tiny.randomize(model)


def pair(name, head, changes, directory):
    """The same weights in transformers' model and, through a checkpoint, in ours."""
    peer = theirs(name, changes)
    peer.save_pretrained(directory)
    return peer, from_pretrained(directory, head).eval()


def batch(side="right", types=False):
    """Ragged sequences; [3, 41]."""
    position = torch.arange(LONG)
    mask = position >= LONG - LENGTHS[:, None] if side == "left" else position < LENGTHS[:, None]
    inputs = {"input_ids": tiny.token_ids(3, LONG) * mask, "attention_mask": mask.long()}
    if types:
        inputs["token_type_ids"] = ((position > 9) & mask).long()
    return inputs


def options(inputs):
    """Two options of each question, the second with its tokens in another order: [3, 2, 41]."""
    ids = inputs["input_ids"]
    return {"input_ids": torch.stack([ids, ids.flip(0)], 1)} | {
        name: torch.stack([x, x.flip(0)], 1) for name, x in inputs.items() if name != "input_ids"
    }


def labels_of(head, config, mask):
    """What a head is trained towards, by the name of the argument."""
    generator = torch.Generator().manual_seed(2)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    if head in ("mlm", "causal", "token"):
        labels = draw(config.vocab_size if head != "token" else config.num_labels, *mask.shape)
        unscored = torch.rand(mask.shape, generator=generator) < 0.7
        return {"labels": labels.masked_fill(unscored | ~mask, -100)}
    if head == "rtd":
        return {"labels": draw(2, *mask.shape)}
    if head == "span":  # The last lies outside of the text and is not scored.
        start = torch.tensor([2, 0, LONG + 7])
        return {"start_positions": start, "end_positions": start + 3}
    if head == "choice":
        return {"labels": draw(2, 3)}
    if config.problem_type == "multi_label_classification":
        return {"labels": draw(2, 3, config.num_labels).float()}
    if config.num_labels == 1:
        return {"labels": torch.randn(3, generator=generator)}
    return {"labels": draw(config.num_labels, 3)}


def run(model, dtype, inputs, labels=None):
    """States of the real tokens, logits, loss and parameters' gradients of a copy in `dtype`."""
    model = copy.deepcopy(model).to(dtype)
    mask = inputs["attention_mask"].bool()
    given = {
        name: x.to(dtype) if x.is_floating_point() else x for name, x in (labels or {}).items()
    }
    output = model(**inputs, **given, output_hidden_states=True)
    flat = mask.flatten(0, -2)
    results = {f"state {i}": state[flat] for i, state in enumerate(output.hidden_states)}
    last = results[f"state {len(output.hidden_states) - 1}"]
    total = 0.0
    if labels is not None:
        results["loss"] = output.loss.detach()
        total = output.loss
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = torch.stack([output.start_logits, output.end_logits], -1)
        last = results["logits"] = logits[mask] if logits.shape[:2] == mask.shape else logits
        if last.dim() > 1:  # Of one label transformers flattens the logits once labels are given.
            last = results["logits"] = last.squeeze(-1)
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    (total + (last * weights).sum() / len(last) ** 0.5).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return results, gradients


def names_of(peer, ours):
    """Our parameter names -> transformers', by value: no two parameters are alike."""
    others = dict(peer.named_parameters())
    names = {
        mine: [n for n, p in others.items() if p.shape == q.shape and torch.equal(p, q)]
        for mine, q in ours.named_parameters()
    }
    assert all(len(found) == 1 for found in names.values())
    return {mine: found[0] for mine, found in names.items()}


def assert_parity(peer, ours, inputs, labels=None):
    """Ours is as near to transformers in float64 as transformers in float32 is."""
    truth, truth_grads = run(peer, torch.float64, inputs, labels)
    theirs, their_grads = run(peer, torch.float32, inputs, labels)
    mine, my_grads = run(ours, torch.float32, inputs, labels)
    names = names_of(peer, ours)
    unused = set(their_grads) - set(names.values())
    assert all(not truth_grads[name].any() for name in unused)
    for my_name, name in names.items():
        # Sums over tokens grow with the weights; the rule's allowance is for values near one.
        size = truth_grads[name].abs().max().clamp(min=1)
        truth[f"d {name}"] = truth_grads[name] / size
        theirs[f"d {name}"] = their_grads[name] / size
        mine[f"d {name}"] = my_grads[my_name] / size
    assert_close(mine, theirs, truth, torch.float32)


# Parity


@pytest.mark.parametrize(("name", "head", "id", "changes"), BASE, ids=IDS_OF_BASE)
def test_backbones(name, head, id, changes, tmp_path):
    peer, ours = pair(name, head, changes, tmp_path)
    types = ours.config.type_vocab_size == 2
    for side in ("right", "left"):
        assert_parity(peer, ours, batch(side, types))


@pytest.mark.parametrize(("name", "head", "id", "changes"), HEADS, ids=IDS_OF_HEADS)
def test_heads(name, head, id, changes, tmp_path):
    peer, ours = pair(name, head, changes, tmp_path)
    # Of a sequence padded on the left, transformers takes the first place for its first token,
    # and lets it predict the token that is really the first.
    right_only = head in ("sequence", "choice", "causal", "span")
    for side in ("right",) if right_only else ("right", "left"):
        inputs = options(batch(side)) if head == "choice" else batch(side)
        if head == "span":  # transformers lets padding, whose states mean nothing, be an answer.
            inputs["attention_mask"].fill_(1)
        labels = labels_of(head, ours.config, inputs["attention_mask"].bool())
        assert_parity(peer, ours, inputs, labels)


def test_parity_notices_a_small_error(tmp_path):
    """The negative control: one table row of 16 moves by one part in ten thousand."""
    peer, ours = pair("DebertaV2Model", "base", {}, tmp_path)
    assert_parity(peer, ours, batch())
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        copied.backbone.encoder.rel_embeddings.weight[3] *= 1.0001
    with pytest.raises(AssertionError):
        truth, _ = run(ours, torch.float64, batch())
        assert_close(run(copied, torch.float32, batch())[0], *[truth] * 2, torch.float32)


def test_replaced_token_head_of_deberta():
    """microsoft's formula; transformers has no such head."""
    model = tiny.randomize(Model(tiny.config(), "rtd"))
    inputs = batch()
    output = model(**inputs)
    head, hidden = model.head, output.last_hidden_state
    x = nn.functional.gelu(head.dense(head.LayerNorm(hidden + hidden[:, :1])))
    torch.testing.assert_close(output.logits, head.classifier(x)[..., 0])
    labels = labels_of("rtd", model.config, inputs["attention_mask"].bool())
    scored = [
        nn.functional.binary_cross_entropy_with_logits(row[:n], label[:n].float(), reduction="sum")
        for row, label, n in zip(output.logits, labels["labels"], LENGTHS, strict=True)
    ]
    loss = model(**inputs, **labels).loss
    torch.testing.assert_close(loss, sum(scored) / LENGTHS.sum())


# Forms of input


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_embeddings_stand_for_their_ids(family, packed):
    model = tiny.randomize(Model(tiny.config(family, position_biased_input=True)))
    ids, options = tiny.token_ids(2, 9), {}
    if packed:
        ids = ids.flatten()
        options = {"cu_seqlens": torch.tensor([0, 5, 18], dtype=torch.int32), "max_seqlen": 13}
    embeds = model.backbone.embeddings.word_embeddings(ids)
    expected = model(ids, **options).last_hidden_state
    got = model(inputs_embeds=embeds, **options).last_hidden_state
    assert torch.equal(got, expected)


def test_defaults_of_positions_types_and_mask():
    model = tiny.randomize(Model(tiny.config("electra")))
    ids = tiny.token_ids(2, 9)
    expected = model(ids).last_hidden_state
    got = model(
        ids,
        torch.ones(2, 9, dtype=torch.bool),
        token_type_ids=torch.zeros_like(ids),
        position_ids=torch.arange(9).expand(2, -1),
    )
    torch.testing.assert_close(got.last_hidden_state, expected)
    for changes in ({"token_type_ids": ids % 2}, {"position_ids": torch.arange(9).flip(0)}):
        assert (model(ids, **changes).last_hidden_state - expected).abs().max() > 0.1


def test_hidden_states_only_when_asked():
    model = tiny.randomize(Model(tiny.config()))
    ids = tiny.token_ids(2, 9)
    assert model(ids).hidden_states is None
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + model.config.num_hidden_layers
    assert output.hidden_states[-1] is output.last_hidden_state
    torch.testing.assert_close(output.hidden_states[0], model.backbone.embeddings(ids, *[None] * 4))


def test_dropout_only_in_training():
    model = Model(tiny.config(hidden_dropout_prob=0.2), "mlm")
    ids = tiny.token_ids(2, 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


# Sizes


@pytest.mark.parametrize(
    ("make", "millions", "embeddings"),
    [
        (deberta.v1_base, 100, False),
        (deberta.v1_large, 350, False),
        (deberta.v1_xlarge, 700, False),
        (deberta.v2_xlarge, 710, False),
        (deberta.v2_xxlarge, 1320, False),
        (deberta.v3_xsmall, 22, False),
        (deberta.v3_small, 44, False),
        (deberta.v3_base, 86, False),
        (deberta.v3_large, 304, False),
        (deberta.mdeberta_v3_base, 86, False),
        (deberta.v1_large, 400, True),
        (deberta.v1_xlarge, 750, True),
        (deberta.v2_xlarge, 900, True),
        (deberta.v2_xxlarge, 1500, True),
        (electra.small, 14, True),
        (electra.base, 110, True),
        (electra.large, 335, True),
    ],
)
def test_published_sizes(make, millions, embeddings):
    """Papers and model cards round, and say not which heads they count; transformers is exact."""
    config = make()
    with torch.device("meta"):
        model = Model(config)
        kind = next(kind for kind, _ in FAMILIES.values() if kind.model_type == config.model_type)
        peer = transformers.AutoModel.from_config(kind(**config.to_dict()))
    assert model.num_parameters() == peer.num_parameters()
    assert model.num_parameters(embeddings) / 1e6 == pytest.approx(millions, rel=0.05)


def test_generators():
    small = electra.generator(electra.small(), 1 / 4)
    assert (small.hidden_size, small.num_attention_heads, small.intermediate_size) == (64, 1, 256)
    base = electra.generator(electra.base(), 1 / 3)
    assert (base.hidden_size, base.num_attention_heads, base.embedding_size) == (256, 4, 768)
    assert base.num_hidden_layers == 12
    v3 = deberta.generator(deberta.v3_large())
    assert (v3.num_hidden_layers, v3.hidden_size) == (12, 1024)


def test_num_parameters():
    model = Model(tiny.config("electra"))
    tables = (67 + 48 + 2) * 20
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters() - model.num_parameters(embeddings=False) == tables


def test_initial_weights():
    model = Model(tiny.config(initializer_range=0.5), "mlm")
    embeddings = model.backbone.embeddings
    assert not embeddings.word_embeddings.weight[0].any(), "the padding row"
    assert embeddings.word_embeddings.weight[1:].std().item() == pytest.approx(0.5, rel=0.1)
    dense = model.backbone.encoder.layer[0].intermediate.dense
    assert dense.weight.std().item() == pytest.approx(0.5, rel=0.1) and not dense.bias.any()
    assert (embeddings.LayerNorm.weight == 1).all()


# Configs


def test_config_takes_transformers_fields():
    config = Config.from_dict(
        {"model_type": "deberta-v2", "pos_att_type": "p2c|c2p", "num_labels": 3, "novelty": 7}
    )
    assert config.pos_att_type == ["p2c", "c2p"]
    assert config.num_labels == 3 and config.extra == {"novelty": 7}
    assert config.embedding_size == config.hidden_size


@pytest.mark.parametrize("theirs", [DebertaConfig, DebertaV2Config, ElectraConfig])
def test_config_defaults_are_transformers(theirs):
    """A config.json that says nothing but its family means what transformers makes of it."""
    ours = Config.from_dict({"model_type": theirs.model_type}).to_dict()
    for name, value in theirs().to_dict().items():
        if name in ours and value is not None:
            assert ours[name] == value, name


# Errors


def call(head="base", family="deberta-v2", changes=(), **inputs):
    def run():
        model = Model(tiny.config(family, **dict(changes)), head)
        model(**inputs)

    return run


IDS = torch.ones(2, 5, dtype=torch.long)
PACKED = {"input_ids": torch.ones(60, dtype=torch.long), "max_seqlen": 60}
PACKED["cu_seqlens"] = torch.tensor([0, 60], dtype=torch.int32)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (call(input_ids=IDS * 67), r"input_ids must be in \[0, vocab_size = 67\), got 67 to 67"),
        (call(input_ids=IDS - 3), r"input_ids must be in .*, got -2 to -2"),
        (
            call(family="electra", input_ids=torch.ones(1, 49, dtype=torch.long)),
            "at most max_position_embeddings = 48 tokens a sequence, got 49",
        ),
        (call(family="electra", **PACKED), "position_ids must be in .* = 48.*, got 0 to 59"),
        (
            call(family="electra", input_ids=IDS, position_ids=IDS * 48),
            r"position_ids must be in \[0, max_position_embeddings = 48\), got 48 to 48",
        ),
        (
            call(family="electra", input_ids=IDS, token_type_ids=IDS * 2),
            r"token_type_ids must be in \[0, type_vocab_size = 2\), got 2 to 2",
        ),
        (call(), "give exactly one of input_ids and inputs_embeds"),
        (
            call(input_ids=IDS, inputs_embeds=torch.zeros(2, 5, 32)),
            "give exactly one of input_ids and inputs_embeds",
        ),
        (call(input_ids=IDS, labels=IDS), "labels: a model without a head"),
        (call("nope", input_ids=IDS), "head must be one of base, mlm, .*choice.*; got 'nope'"),
        (lambda: Config(model_type="gpt"), "model_type must be one of .*; got 'gpt'"),
        (lambda: Config(conv_kernel_size=4), "conv_kernel_size must be odd, got 4"),
        (lambda: Config(span_head="nope"), "span_head must be one of linear, beam; got 'nope'"),
        (lambda: Config(sequence_head="nope"), "sequence_head must be one of pooled, linear; got"),
        (
            lambda: Config.from_dict(
                {"model_type": "electra", "position_embedding_type": "relative_key"}
            ),
            "position_embedding_type must be 'absolute', got 'relative_key'",
        ),
        (lambda: electra.generator(electra.small(), 0), r"width must be in \(0, 1\], got 0"),
        (
            call(changes={"pos_att_type": ["c2p", "x"]}, input_ids=IDS),
            r"pos_att_type may hold c2p, p2c and p2p; got \['x'\]",
        ),
        (
            call(changes={"conv_kernel_size": 3}, input_ids=IDS, causal=True),
            "causal: a convolution shows every token the next one",
        ),
        (
            call(input_ids=IDS, attention_mask=IDS[:, :3]),
            r"attention_mask must have one value a token, \[2, 5\], got \[2, 3\]",
        ),
        (call("choice", input_ids=IDS), r"input_ids must be \[B, C, L\] for a choice head, got"),
        (
            call("choice", "electra", {"summary_type": "last"}, input_ids=IDS),
            "summary_type must be 'first', with a projection, for a choice head; got 'last'",
        ),
        (lambda: Config(hidden_size=30, num_attention_heads=4), "a multiple of .*4.*, got 30"),
        (lambda: activation("nope"), "activation must be one of .*; got 'nope'"),
        (call(changes={"hidden_act": "nope"}, input_ids=IDS), "activation must be one of"),
    ],
)
def test_errors(function, message):
    with pytest.raises(ValueError, match=message):
        function()
