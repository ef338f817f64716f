"""Checkpoints go to transformers and come back bit for bit; damaged ones give one clear error."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import DebertaConfig, DebertaV2Config, ElectraConfig

from fastdeberta.models import Config, Model, checkpoint, from_pretrained
from fastdeberta.models.heads import HEADS

CONFIGS = {"deberta": DebertaConfig, "deberta-v2": DebertaV2Config, "electra": ElectraConfig}
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
THREE = {"id2label": LABELS}
ROUND_TRIPS = [
    ("deberta", "base", "DebertaModel", {}),
    ("deberta", "base", "DebertaModel", {"position_biased_input": True, "type_vocab_size": 2}),
    ("deberta", "mlm", "DebertaForMaskedLM", {}),
    ("deberta", "mlm", "DebertaForMaskedLM", {"legacy": True}),
    ("deberta", "sequence", "DebertaForSequenceClassification", THREE),
    ("deberta", "token", "DebertaForTokenClassification", THREE),
    ("deberta", "span", "DebertaForQuestionAnswering", {}),
    ("deberta-v2", "base", "DebertaV2Model", {}),
    ("deberta-v2", "base", "DebertaV2Model", {"conv_kernel_size": 3, "embedding_size": 20}),
    ("deberta-v2", "mlm", "DebertaV2ForMaskedLM", {}),
    ("deberta-v2", "mlm", "DebertaV2ForMaskedLM", {"legacy": True, "share_att_key": False}),
    ("deberta-v2", "sequence", "DebertaV2ForSequenceClassification", THREE),
    ("deberta-v2", "token", "DebertaV2ForTokenClassification", THREE),
    ("deberta-v2", "span", "DebertaV2ForQuestionAnswering", {}),
    ("deberta-v2", "choice", "DebertaV2ForMultipleChoice", {}),
    ("electra", "base", "ElectraModel", {}),
    ("electra", "mlm", "ElectraForMaskedLM", {"embedding_size": 32}),
    ("electra", "rtd", "ElectraForPreTraining", {}),
    ("electra", "causal", "ElectraForCausalLM", {"is_decoder": True}),
    ("electra", "sequence", "ElectraForSequenceClassification", THREE),
    ("electra", "token", "ElectraForTokenClassification", THREE),
    ("electra", "span", "ElectraForQuestionAnswering", {}),
    ("electra", "choice", "ElectraForMultipleChoice", {}),
]
# A head's output that says most.
OUTPUT = {"base": "last_hidden_state", "span": "start_logits"}


def assert_same(ours, others):
    """Two models or state dicts, bit for bit."""
    ours, others = (x.state_dict() if isinstance(x, Model) else x for x in (ours, others))
    assert ours.keys() == others.keys()
    assert [name for name in ours if not torch.equal(ours[name], others[name])] == []


def saved(directory, family="deberta-v2", head="base", **changes):
    """A model with random weights, written to `directory`."""
    model = tiny.randomize(Model(tiny.config(family, **changes), head))
    model.save_pretrained(directory)
    return model


# There and back


@pytest.mark.parametrize(("family", "head", "name", "changes"), ROUND_TRIPS)
def test_ours_to_transformers_and_back(family, head, name, changes, tmp_path):
    ours = saved(tmp_path / "ours", family, head, **changes)
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [name]
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = tiny.token_ids(*((2, 2, 9) if head == "choice" else (2, 9)))
    output = OUTPUT.get(head, "logits")
    torch.testing.assert_close(getattr(ours(ids), output), getattr(theirs(ids), output))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(from_pretrained(tmp_path / "theirs", head).state_dict(), ours.state_dict())


@pytest.mark.parametrize(("family", "head", "name", "changes"), ROUND_TRIPS)
def test_transformers_to_ours_and_back(family, head, name, changes, tmp_path):
    values = tiny.config(family, **changes).to_dict()
    config = CONFIGS[family](**values)
    theirs = tiny.randomize(getattr(transformers, name)(config))
    theirs.save_pretrained(tmp_path / "theirs")
    from_pretrained(tmp_path / "theirs", head).save_pretrained(tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    assert_same(again.state_dict(), theirs.state_dict())
    of_the_file = {"_name_or_path", "architectures"}
    was, now = theirs.config.to_dict(), again.config.to_dict()
    assert {k for k in was if k not in now or was[k] != now[k]} <= of_the_file


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_replaced_token_model(family, tmp_path):
    """transformers has the head for ELECTRA only; it loads DeBERTa's backbone all the same."""
    ours = saved(tmp_path, family, "rtd")
    assert_same(from_pretrained(tmp_path, "rtd").state_dict(), ours.state_dict())
    head = "discriminator_predictions" if family == "electra" else "mask_predictions"
    assert f"{head}.dense.weight" in load_file(tmp_path / "model.safetensors")
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "bare")
    backbone = from_pretrained(tmp_path / "bare").state_dict()
    assert_same(backbone, {k: v for k, v in ours.state_dict().items() if k in backbone})


# Forms of transformers' layout; other makers' are in test_layouts.py


def test_bare_backbone(tmp_path):
    """A DebertaV2Model's own file has no "deberta." before its names."""
    ours = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("deberta."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors")
    assert_same(from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_sharded(tmp_path):
    ours = saved(tmp_path / "whole", head="mlm")
    theirs = transformers.DebertaV2ForMaskedLM.from_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert_same(from_pretrained(tmp_path / "sharded", "mlm").state_dict(), ours.state_dict())
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"no weights at .*{shards[0].name}"):
        from_pretrained(tmp_path / "sharded", "mlm")


def pickled(directory):
    """Rewrites a checkpoint's weights as pytorch_model.bin."""
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    weights.unlink()
    return directory / "pytorch_model.bin"


def test_pickled(tmp_path):
    ours = saved(tmp_path)
    pickled(tmp_path)
    assert_same(from_pretrained(tmp_path).state_dict(), ours.state_dict())


class Code:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_run_no_code(tmp_path):
    saved(tmp_path)
    torch.save({"x": Code(tmp_path / "ran")}, pickled(tmp_path))
    with pytest.raises(
        ValueError, match="pytorch_model.bin is damaged, or holds more than weights"
    ):
        from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_sharded_pickles(tmp_path):
    ours = saved(tmp_path)
    tensors = torch.load(pickled(tmp_path))
    shards = {
        f"pytorch_model-0000{i}-of-00002.bin": names
        for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1)
    }
    for file, names in shards.items():
        torch.save({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.bin.index.json")
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert_same(from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_a_named_file(tmp_path):
    ours = saved(tmp_path)
    pickled(tmp_path).rename(tmp_path / "pytorch_model.step-9.bin")
    with pytest.raises(FileNotFoundError, match="weights= may name one of pytorch_model.step-9.b"):
        from_pretrained(tmp_path)
    got = from_pretrained(tmp_path, weights="pytorch_model.step-9.bin")
    assert_same(got.state_dict(), ours.state_dict())
    with pytest.raises(FileNotFoundError, match="no weights at .*other.bin"):
        from_pretrained(tmp_path, weights="other.bin")


@pytest.mark.parametrize("form", ["safetensors", "pickle", "named"])
def test_hub(form, tmp_path, monkeypatch):
    """Only what is needed comes from the hub: pickles where there are no safetensors."""
    ours, options, asked = saved(tmp_path / "hub"), {}, []
    if form != "safetensors":
        file = pickled(tmp_path / "hub")
    if form == "named":
        options["weights"] = file.rename(file.with_name("pytorch_model.generator.bin")).name

    def download(name, allow_patterns):
        assert name == "someone/some-model"
        asked.append(allow_patterns)
        (tmp_path / "cache").mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in (tmp_path / "hub").glob(pattern):
                shutil.copy(path, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    got = from_pretrained("someone/some-model", **options)
    assert_same(got.state_dict(), ours.state_dict())
    assert len(asked) == (2 if form == "pickle" else 1)

    def offline(name, **options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no model directory at someone/some-model, and"):
        from_pretrained("someone/some-model")


# Heads


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("head", [head for head in HEADS if head != "base"])
def test_a_new_head_must_be_allowed(family, head, tmp_path):
    ours = saved(tmp_path, family)
    with pytest.raises(ValueError, match=f"no weights for head '{head}' .*allow_new_head=True"):
        from_pretrained(tmp_path, head)
    got = from_pretrained(tmp_path, head, allow_new_head=True).state_dict()
    assert_same({k: v for k, v in got.items() if not k.startswith("head.")}, ours.state_dict())
    assert any(name.startswith("head.") for name in got)


def test_only_what_the_head_lacks_is_new(tmp_path):
    """Three labels instead of two: the pooler stays."""
    ours = saved(tmp_path, head="sequence")
    with pytest.raises(ValueError, match="no weights for head 'sequence' .head.classifier.bias, "):
        from_pretrained(tmp_path, "sequence", id2label=LABELS)
    got = from_pretrained(tmp_path, "sequence", allow_new_head=True, id2label=LABELS)
    expected = ours.state_dict()
    for name, tensor in got.state_dict().items():
        same = tensor.shape == expected[name].shape and torch.equal(tensor, expected[name])
        assert same != name.startswith("head.classifier."), name


@pytest.mark.parametrize(
    ("family", "trained", "asked"),
    [
        ("deberta-v2", "sequence", "token"),
        ("deberta", "entity", "token"),
        ("electra", "choice", "token"),
        ("deberta-v2", "choice", "entity"),
    ],
)
def test_a_classifier_behind_other_layers_is_not_reused(family, trained, asked, tmp_path):
    """Both have a `classifier` of the same shape, which means nothing without the layer below."""
    labels = {"id2label": {0: "score"}}
    ours = saved(tmp_path, family, trained, **labels)
    with pytest.raises(ValueError, match="no weights for head '.*' .head.classifier.bias, "):
        from_pretrained(tmp_path, asked)
    got = from_pretrained(tmp_path, asked, allow_new_head=True).state_dict()
    assert not torch.equal(got["head.classifier.weight"], ours.head.classifier.weight)


def test_reports(tmp_path, caplog):
    """What was left out and what is new: as data, in the log, and with an error."""
    saved(tmp_path, head="rtd")
    left_out = {
        f"mask_predictions.{part}.{kind}"
        for part in ("LayerNorm", "classifier", "dense")
        for kind in ("weight", "bias")
    }
    model = Model(tiny.config(), "token")
    report = checkpoint.load(model, tmp_path, allow_new_head=True)
    assert set(report.left_out) == left_out
    assert report.new == ["head.classifier.weight", "head.classifier.bias"]
    assert not report.missing and not report.reshaped and not report.unexpected
    caplog.set_level("INFO")
    from_pretrained(tmp_path, "token", allow_new_head=True)
    logged = {record.levelname: record.message for record in caplog.records}
    assert all(name in logged["INFO"] for name in left_out)
    assert "random values: head.classifier.weight, head.classifier.bias" in logged["WARNING"]
    with pytest.raises(checkpoint.CheckpointError) as caught:
        from_pretrained(tmp_path, num_hidden_layers=5)
    missing = caught.value.report.missing
    assert len(missing) == 2 * len([n for n in model.state_dict() if ".layer.0." in n])
    assert all(".layer.3." in name or ".layer.4." in name for name in missing)


def test_allow_new_head_excuses_nothing_else(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="missing backbone.encoder.layer.3"):
        from_pretrained(tmp_path, "mlm", allow_new_head=True, num_hidden_layers=4)


# Configs


def test_labels(tmp_path):
    saved(tmp_path, head="sequence", id2label=LABELS)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
    assert values["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.id2label == LABELS and theirs.num_labels == 3
    config = Config.load(tmp_path)
    assert config.id2label == LABELS and config.num_labels == 3
    changed = from_pretrained(
        tmp_path, "sequence", id2label={0: "a", 1: "b", 2: "c"}, cls_dropout=0.5
    )
    assert changed.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert changed.config.cls_dropout == changed.head.dropout.p == 0.5


def test_unknown_keys_are_kept(tmp_path):
    saved(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"z_steps": 2, "task_specific_params": {"a": [1]}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = from_pretrained(tmp_path)
    assert model.config.extra["z_steps"] == 2
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == values


# Errors


def write(name, text):
    return lambda directory: (directory / name).write_text(text)


def remove(name):
    return lambda directory: (directory / name).unlink()


def truncate(name, pickle=False):
    def damage(directory):
        if pickle:
            pickled(directory)
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return damage


def index(text):
    """The weights' file becomes an index with this text."""

    def damage(directory):
        file = (directory / "model.safetensors").rename(directory / "model.safetensors.index.json")
        file.write_text(text)

    return damage


def change(**tensors):
    """Tensors to add, or with None to remove."""

    def damage(directory):
        path = directory / "model.safetensors"
        values = load_file(path) | {name.replace("__", "."): t for name, t in tensors.items()}
        save_file({name: t for name, t in values.items() if t is not None}, path)

    return damage


LAYER = "deberta__encoder__layer__0__output__dense__bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no model directory at "),
        (remove("config.json"), "no config.json in "),
        (remove("model.safetensors"), "no weights at .*model.safetensors"),
        (truncate("model.safetensors"), "model.safetensors is damaged or truncated: "),
        (write("model.safetensors", ""), "model.safetensors is damaged or truncated: "),
        (truncate("pytorch_model.bin", pickle=True), "pytorch_model.bin is damaged, or holds "),
        (write("config.json", "{"), "config.json is not valid JSON: "),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "config.json is not valid JSON: "),
        (write("config.json", "[]"), "config.json must hold a JSON object with a model_type"),
        (write("config.json", "{}"), "config.json must hold a JSON object with a model_type"),
        (write("config.json", '{"model_type": "gpt2"}'), "one of deberta, .*, bert; got 'gpt2'"),
        (index("{"), "index.json is not a JSON object with a weight_map"),
        (index("{}"), "index.json is not a JSON object with a weight_map"),
        (lambda d: torch.save({"x": 1}, pickled(d)), "pytorch_model.bin is damaged, or holds mor"),
        (change(bert__encoder__rel_embeddings__weight=torch.ones(1)), "holds .* twice, under two"),
        (change(**{LAYER: None}), "missing backbone.encoder.layer.0.output.dense.bias"),
        (change(**{LAYER: torch.ones(5)}), "of another shape backbone.encoder.layer.0.output.den"),
        (change(novelty=torch.ones(5)), "does not match the model: unexpected novelty"),
        (
            change(**{f"a{i}": torch.ones(1) for i in range(5)}, **{LAYER: None}),
            "missing backbone.encoder.*dense.bias; unexpected a0, a1, a2 and 2 more",
        ),
    ],
)
def test_damaged(damage, message, tmp_path):
    directory = tmp_path / "model"
    saved(directory)
    damage(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        from_pretrained(directory)
    assert "\n" not in str(caught.value)


def test_nothing_is_loaded_from_a_checkpoint_that_does_not_match(tmp_path):
    saved(tmp_path, num_hidden_layers=2)
    model = Model(tiny.config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not match"):
        checkpoint.load(model, tmp_path)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "nope"}, "head must be one of base, mlm, .*choice.*; got 'nope'"),
        ({"hiden_size": 3}, "config has no field 'hiden_size'"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path, **options)


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", "./missing", "../missing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no model directory at "):
            from_pretrained(path)
