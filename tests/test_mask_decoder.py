"""The enhanced mask decoder against a transcription of its equations in float64."""

import math

import pytest
import tiny
import torch
from closeness import assert_close

from fastdeberta.models import Config, Model

B, L = 3, 29
NAMES = ("last_hidden_state", "logits")
LENGTHS = torch.tensor([29, 17, 1])


def transcribed(model, ids, mask):
    """DeBERTa, section 3.2, one equation after the other, from the parameters alone.

    The encoder's layers run as they are, up to the second-to-last; the decoder is written out.
    """
    config, backbone = model.config, model.backbone
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    layer = backbone.encoder.layer[-1]
    dtype = backbone.encoder.rel_embeddings.weight.dtype
    plain = Model(Config.from_dict({**config.to_dict(), "emd": False}), "mlm").to(dtype)
    plain.load_state_dict(model.state_dict(), strict=False)
    content = plain.eval()(ids, mask, output_hidden_states=True).hidden_states[-2]  # H

    rule, table = backbone.encoder.relative_position, backbone.encoder.relative_table()
    distance = torch.arange(L)[:, None] - torch.arange(L)[None, :]
    rows = rule.row(distance)
    attention = layer.attention.self
    if config.model_type == "deberta":
        # Rows of in_proj are interleaved by head: query, key, value.
        fused = attention.in_proj.weight.view(heads, 3, size, width)
        weights = [fused[:, i].reshape(heads * size, width) for i in range(3)]
        biases = [attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias]
        position_key = table @ attention.pos_proj.weight.T
        position_query = table @ attention.pos_q_proj.weight.T + attention.pos_q_proj.bias
    else:
        parts = (attention.query_proj, attention.key_proj, attention.value_proj)
        weights, biases = [p.weight for p in parts], [p.bias for p in parts]
        position_key = table @ weights[1].T + biases[1]
        position_query = table @ weights[0].T + biases[0]

    def split(x):
        return x.unflatten(-1, (heads, size)).transpose(-2, -3)

    key, value = (split(content @ w.T + b) for w, b in zip(weights[1:], biases[1:], strict=True))
    position_key, position_query = split(position_key), split(position_query)
    positions = backbone.embeddings.position_embeddings.weight[:L]
    if backbone.embeddings.embed_proj is not None:
        positions = positions @ backbone.embeddings.embed_proj.weight.T
    stream = content + positions  # I of the first pass
    for _ in range(config.emd_passes):
        query = split(stream @ weights[0].T + biases[0])
        scores = torch.empty(B, heads, L, L, dtype=dtype)
        for i in range(L):
            for j in range(L):
                r = rows[i, j]
                scores[:, :, i, j] = (
                    (query[:, :, i] * key[:, :, j]).sum(-1)
                    + (query[:, :, i] * position_key[:, r]).sum(-1)
                    + (key[:, :, j] * position_query[:, r]).sum(-1)
                ) / math.sqrt(3 * size)
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        output = layer.attention.output
        stream = output.LayerNorm(output.dense(context) + stream)
        inner = torch.nn.functional.gelu(layer.intermediate.dense(stream))
        stream = layer.output.LayerNorm(layer.output.dense(inner) + stream)
    head = model.head
    x = head.LayerNorm(torch.nn.functional.gelu(head.dense(stream)))
    return stream, x @ backbone.embeddings.word_embeddings.weight.T + head.bias


CASES = {
    "v3": ("deberta-v2", {}),
    "once": ("deberta-v2", {"emd_passes": 1}),
    "thrice": ("deberta-v2", {"emd_passes": 3}),
    "v1": ("deberta", {}),
    "two-layers": ("deberta-v2", {"num_hidden_layers": 2}),
    "narrow": ("deberta-v2", {"embedding_size": 20}),
}


def made(name, **more):
    family, changes = CASES[name]
    return tiny.randomize(Model(tiny.config(family, emd=True, **changes, **more), "mlm"))


@pytest.mark.parametrize("name", CASES)
def test_equations(name):
    model = made(name)
    ids, mask = tiny.token_ids(B, L), torch.arange(L) < LENGTHS[:, None]
    double = Model(model.config, "mlm").to(torch.float64).eval()
    double.load_state_dict(model.state_dict())
    truth, peer = (
        {name: x[mask] for name, x in zip(NAMES, transcribed(m, ids, mask), strict=True)}
        for m in (double, model)
    )
    for unpad in (True, False):
        model.backbone.unpad = double.backbone.unpad = unpad
        outputs = [m(ids, mask) for m in (double, model)]
        wide, ours = ({name: getattr(x, name)[mask] for name in NAMES} for x in outputs)
        torch.testing.assert_close(wide, truth, rtol=1e-9, atol=1e-9)
        assert_close(ours, peer, truth, torch.float32)


def test_transcription_notices_the_order_of_streams():
    """The negative control: queries that start without the positions."""
    model = made("v3").to(torch.float64)
    ids, mask = tiny.token_ids(B, L), torch.ones(B, L, dtype=torch.bool)
    states, _ = transcribed(model, ids, mask)
    with torch.no_grad():
        model.backbone.embeddings.position_embeddings.weight.zero_()
    assert (model(ids).last_hidden_state - states).abs().max() > 1e-3


def test_states():
    """Embeddings, every layer but the last, and the decoder's."""
    model = made("v3")
    ids = tiny.token_ids(B, L)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + model.config.num_hidden_layers
    assert output.hidden_states[-1] is output.last_hidden_state
    with torch.no_grad():
        fast = model(ids, output_hidden_states=True)
    for slow, quick in zip(output.hidden_states, fast.hidden_states, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    model = made("v3")
    model(tiny.token_ids(B, L), labels=tiny.token_ids(B, L)).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_decoder_is_the_masked_language_models_alone():
    for head in ("base", "rtd", "sequence"):
        model = Model(tiny.config(emd=True), head)
        assert not model.config.emd and model.backbone.embeddings.position_embeddings is None
    biased = Model(tiny.config(emd=True, position_biased_input=True), "mlm")
    assert biased.backbone.embeddings.position_embeddings is not None


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"emd_passes": 0}])
def test_impossible_decoders(changes):
    with pytest.raises(ValueError, match="emd needs num_hidden_layers >= 2 and emd_passes >= 1"):
        tiny.config(emd=True, **changes)
