"""Google's ELECTRA as arrays of TensorFlow's variables, written here under Google's names."""

import json
import re

import numpy as np
import pytest
import tiny
import torch
from test_checkpoint import assert_same

from fastdeberta.models import Model, from_pretrained


def made(head, **changes):
    return tiny.randomize(Model(tiny.config("electra", **changes), head))


SPAN = {
    "start": "dense",
    "end_dense": "qa_hidden",
    "end": "dense_1",
    "impossible_dense": "dense_2",
    "impossible": "dense_3",
}


def variables(model, scope):
    """A model's weights as TensorFlow's variables of google-research/electra."""
    found = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        name = re.sub(r"_proj\.(weight|bias)$", r".\1", name)
        name = name.replace("embeddings.embed.", "embeddings_project.")
        name = re.sub(r"^backbone\.", f"{scope}.", name)
        name = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name)
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        name = re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)
        name = re.sub(r"_embeddings\.weight$", "_embeddings", name)
        if model.head_name == "span":
            for ours, google in SPAN.items():
                name = re.sub(rf"^head\.{ours}\.", f"task_specific.squad.{google}.", name)
        if name.startswith("head."):
            head = {"mlm": "generator_predictions", "rtd": "discriminator_predictions"}
            name = name.replace("head.bias", "head.output_bias")
            name = name.replace("head.classifier.", "head.dense_1.")
            name = name.replace("head", head.get(model.head_name, "task_specific.cola"), 1)
            name = name.replace("cola.dense_1.", "cola.dense.")
        if name.endswith(".weight"):
            name, array = re.sub(r"\.weight$", ".kernel", name), array.T
        found[name.replace(".", "/")] = array
    return found


def google(untied=False):
    """Discriminator, generator, and the one checkpoint that holds both."""
    ours = made("rtd")
    small = made("mlm", hidden_size=16, intermediate_size=64, num_attention_heads=1)
    small.backbone.embeddings.word_embeddings.weight.data.mul_(2)
    if not untied:
        small.backbone.embeddings.load_state_dict(
            {n: t for n, t in ours.backbone.embeddings.state_dict().items() if "proj" not in n},
            strict=False,
        )
    saved = variables(small, "generator")
    if not untied:
        saved = {n: a for n, a in saved.items() if not n.startswith("generator/embeddings/")}
    saved |= variables(ours, "electra")
    slots = {f"{n}/adam_{k}": np.ones_like(a) for n, a in saved.items() for k in "mv"}
    return ours, small, saved | slots | {"global_step": np.array(7)}


def test_googles_names():
    """The names that the fixture writes are the ones in Google's code."""
    names = google()[2].keys()
    layer = "encoder/layer_1/"
    expected = {
        "electra/embeddings/word_embeddings",
        "electra/embeddings/LayerNorm/gamma",
        "electra/embeddings_project/kernel",
        f"electra/{layer}attention/self/query/kernel",
        f"generator/{layer}attention/output/LayerNorm/beta",
        f"generator/{layer}intermediate/dense/bias",
        f"electra/{layer}output/dense/kernel/adam_v",
        "generator/embeddings_project/bias",
        "generator_predictions/dense/kernel",
        "generator_predictions/LayerNorm/beta",
        "generator_predictions/output_bias",
        "discriminator_predictions/dense/bias",
        "discriminator_predictions/dense_1/kernel",
    }
    assert expected <= names


def write_arrays(directory, arrays, form):
    directory.mkdir(exist_ok=True)
    if form == "npz":
        np.savez(directory / "electra.npz", **arrays)
        return
    for name, array in arrays.items():
        if form == "dots":
            name = name.replace("/", ".")
        elif form == "colons":
            name = name.replace("/", ":") + ":0"
        path = directory / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


@pytest.mark.parametrize("form", ["npz", "folders", "dots", "colons"])
@pytest.mark.parametrize("untied", [False, True])
def test_googles_electra(form, untied, tmp_path):
    """No config: sizes come from the arrays; heads cannot."""
    ours, small, arrays = google(untied)
    write_arrays(tmp_path, arrays, form)
    got = from_pretrained(tmp_path, "rtd", num_attention_heads=2)
    assert_same(got, ours)
    ids = tiny.token_ids(2, 9)
    torch.testing.assert_close(got.eval()(ids).logits, ours(ids).logits)
    assert from_pretrained(tmp_path).config.num_attention_heads == 1
    generator = from_pretrained(tmp_path, "mlm")
    assert_same(generator, small)
    torch.testing.assert_close(generator.eval()(ids).logits, small(ids).logits)
    same = torch.equal(*(m.backbone.embeddings.word_embeddings.weight for m in (ours, small)))
    assert same != untied


def test_googles_shared_encoder_and_config(tmp_path):
    """Without `untied_generator` both heads stand on one encoder."""
    ours = made("rtd")
    lm = made("mlm")
    lm.backbone.load_state_dict(ours.backbone.state_dict())
    write_arrays(tmp_path, variables(lm, "electra") | variables(ours, "electra"), "npz")
    (tmp_path / "config.json").write_text(
        json.dumps(ours.config.to_dict() | {"hidden_dropout_prob": 0.3})
    )
    got = from_pretrained(tmp_path, "mlm")
    assert_same(got, lm)
    assert got.config.num_attention_heads == 2 and got.config.hidden_dropout_prob == 0.3


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_googles_fine_tuned_classifier(head, tmp_path):
    labels = {"id2label": {i: f"LABEL_{i}" for i in range(3)}}
    ours = made(head, sequence_head="linear", **labels)
    arrays = variables(ours, "electra")
    assert arrays["task_specific/cola/dense/kernel"].shape == (32, 3)
    write_arrays(tmp_path, arrays, "npz")
    got = from_pretrained(tmp_path, head)
    assert_same(got, ours)
    assert got.config.id2label == labels["id2label"]


@pytest.mark.parametrize("answerable", [True, False])
def test_googles_question_answering(answerable, tmp_path):
    changes = {"span_head": "beam", "span_hidden_size": 24, "span_answerable": answerable}
    ours = made("span", **changes)
    arrays = variables(ours, "electra")
    assert arrays["task_specific/squad/qa_hidden/kernel"].shape == (64, 24)
    assert ("task_specific/squad/dense_3/bias" in arrays) == answerable
    write_arrays(tmp_path, arrays, "npz")
    assert_same(from_pretrained(tmp_path, "span"), ours)
    from_pretrained(tmp_path)


class Code:
    def __reduce__(self):
        return (print, ("ran",))


def test_wrong_arrays(tmp_path, capsys):
    _, _, arrays = google()
    write_arrays(tmp_path / "two", arrays, "npz")
    np.savez(tmp_path / "two/more.npz", **arrays)
    with pytest.raises(ValueError, match="must hold one .npz file, or none; .*electra.npz, more.n"):
        from_pretrained(tmp_path / "two")
    write_arrays(tmp_path / "short", arrays, "npz")
    content = (tmp_path / "short/electra.npz").read_bytes()
    (tmp_path / "short/electra.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="electra.npz is damaged or no file of arrays"):
        from_pretrained(tmp_path / "short")
    write_arrays(tmp_path / "code", {"electra/x": np.array([Code()])}, "npz")
    with pytest.raises(ValueError, match="electra.npz is damaged or no file of arrays"):
        from_pretrained(tmp_path / "code")
    assert "ran" not in capsys.readouterr().out
    write_arrays(tmp_path / "other", {"bert/encoder/x": np.ones(3)}, "npz")
    with pytest.raises(ValueError, match="not Google's ELECTRA: no electra.embeddings.word_embed"):
        from_pretrained(tmp_path / "other")
    (tmp_path / "unconverted").mkdir()
    (tmp_path / "unconverted/model.ckpt.index").touch()
    with pytest.raises(FileNotFoundError, match="files must be converted first, see weights.read_"):
        from_pretrained(tmp_path / "unconverted")
