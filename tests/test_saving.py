"""Saving: whole or in shards, never half, and models that transformers has not."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from test_checkpoint import assert_same, saved

from fastdeberta.models import Model, checkpoint, from_pretrained


def test_saving_shards(tmp_path):
    ours = tiny.randomize(Model(tiny.config(), "mlm"))
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        tensors = load_file(tmp_path / shard).values()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 20_000
    index = "model.safetensors.index.json"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", index, *shards}
    assert_same(from_pretrained(tmp_path, "mlm").state_dict(), ours.state_dict())
    theirs, report = transformers.DebertaV2ForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    table = theirs.state_dict()["deberta.embeddings.word_embeddings.weight"]
    assert torch.equal(table, ours.backbone.embeddings.word_embeddings.weight)
    saved(tmp_path)  # Whole again: nothing of the shards is left.
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("size", [0, -1, "20", "20 parsecs", 2.5])
def test_wrong_shard_sizes(size, tmp_path):
    ours = saved(tmp_path)
    with pytest.raises(ValueError, match="max_shard_size must be bytes above 0 or such as"):
        Model(tiny.config(num_hidden_layers=1)).save_pretrained(tmp_path, size)
    assert_same(from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("sizes", [(None, "20KB"), ("20KB", None), ("20KB", "20KB")], ids=str)
def test_a_save_that_is_cut_off_mixes_nothing(sizes, tmp_path, monkeypatch):
    """At whichever file: what loads then is one of the two models, or nothing."""
    models = [tiny.randomize(Model(tiny.config()), std) for std in (0.25, 0.5)]
    replace, outcomes, moved = Path.replace, set(), 0
    while "finished" not in outcomes:
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", replace)
            models[0].save_pretrained(tmp_path / str(moved), sizes[0])
            left = iter(range(moved))

            def cut_off(path, target, left=left):
                if path.parent.name == ".model" and next(left, None) is None:
                    raise KeyboardInterrupt
                return replace(path, target)

            patched.setattr(Path, "replace", cut_off)
            try:
                models[1].save_pretrained(tmp_path / str(moved), sizes[1])
                outcomes.add("finished")
            except KeyboardInterrupt:
                pass
        try:
            loaded = from_pretrained(tmp_path / str(moved)).state_dict()
        except FileNotFoundError:
            outcomes.add("nothing")
        else:
            same = [
                all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())
                for model in models
            ]
            assert any(same)
            outcomes.add(f"model {same.index(True)}")
        moved += 1
    assert moved > 2 and "model 1" in outcomes
    assert ("nothing" in outcomes) == (sizes == ("20KB", "20KB"))


OWN = [
    ("deberta", "choice", {}, {"pooler.dense.weight", "classifier.weight"}),
    ("deberta", "causal", {}, {"lm_predictions.lm_head.dense.weight"}),
    ("deberta-v2", "causal", {"legacy": True}, {"cls.predictions.transform.dense.weight"}),
    ("deberta", "rtd", {}, {"mask_predictions.LayerNorm.weight", "mask_predictions.dense.bias"}),
    ("deberta-v2", "rtd", {}, {"mask_predictions.classifier.weight"}),
    ("deberta-v2", "mlm", {"emd": True}, {"deberta.embeddings.position_embeddings.weight"}),
    ("electra", "sequence", {"sequence_head": "linear"}, {"classifier.weight"}),
    ("deberta-v2", "sequence", {"sequence_head": "linear"}, {"classifier.weight"}),
    ("electra", "span", {"span_head": "beam"}, {"qa_outputs.start.weight"}),
    ("deberta-v2", "entity", {}, {"proj.weight", "classifier.weight"}),
]


@pytest.mark.parametrize(("family", "head", "changes", "names"), OWN)
def test_models_that_transformers_has_not(family, head, changes, names, tmp_path):
    """No class is claimed for them, not even the one that a config was read with."""
    extra = {"architectures": ["SomethingElse"]}
    ours = saved(tmp_path, family, head, **changes, **extra)
    assert names <= load_file(tmp_path / "model.safetensors").keys()
    claimed = json.loads((tmp_path / "config.json").read_text()).get("architectures")
    assert claimed == (["DebertaV2ForMaskedLM"] if "emd" in changes else None)
    again = from_pretrained(tmp_path, head)
    assert_same(again.state_dict(), ours.state_dict())
    for name in ("emd", "span_head", "sequence_head", "legacy", "is_decoder"):
        assert getattr(again.config, name) == getattr(ours.config, name)


def test_saving_keeps_other_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    saved(tmp_path)
    ours = saved(tmp_path, head="mlm")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "config.json", "model.safetensors"}
    assert_same(from_pretrained(tmp_path, "mlm").state_dict(), ours.state_dict())


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    ours = saved(tmp_path)
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Model(tiny.config(num_hidden_layers=1)).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert_same(from_pretrained(tmp_path).state_dict(), ours.state_dict())
