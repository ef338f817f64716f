"""Presets: what they say against the published tables, their miniatures, names and errors."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from fastdeberta import cli
from fastdeberta.datasets import wiki_leads
from fastdeberta.models import Model
from fastdeberta.pretraining import presets
from fastdeberta.pretraining.corpus import load_corpus
from fastdeberta.pretraining.prepare import PrepareSettings, prepare
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.shards import read_meta
from fastdeberta.pretraining.task import Pretraining
from fastdeberta.training.accounting import training_flops
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import build, load_yaml
from fastdeberta.training.trainer import Trainer

# Steps, batch, length, learning rate, masked; millions of parameters, with their tables or not.
TABLE = {
    "bert-base": (1e6, 256, 512, 1e-4, 0.15, 110, True),
    "bert-small": (1.45e6, 128, 128, 5e-4, 0.15, 14, True),
    "deberta-base": (1e6, 2048, 512, 2e-4, 0.15, 100, False),
    "deberta-large": (1e6, 2048, 512, 2e-4, 0.15, 350, False),
    "deberta-mt": (8e4, 256, 512, 1e-4, 0.15, 100, False),
    "deberta-v2-xlarge": (1e6, 2048, 512, 1.5e-4, 0.15, 900, True),
    "deberta-v2-xxlarge": (1e6, 2048, 512, 1.5e-4, 0.15, 1500, True),
    "deberta-v3-base": (5e5, 8192, 512, 6e-4, 0.15, 86, False),
    "deberta-v3-large": (5e5, 8192, 512, 3e-4, 0.15, 304, False),
    "deberta-v3-small": (5e5, 8192, 512, 6e-4, 0.15, 44, False),
    "deberta-v3-xsmall": (5e5, 8192, 512, 6e-4, 0.15, 22, False),
    "deberta-xlarge": (1e6, 2048, 512, 2e-4, 0.15, 750, True),
    "electra-base": (766e3, 256, 512, 2e-4, 0.15, 110, True),
    "electra-large": (4e5, 2048, 512, 2e-4, 0.25, 335, True),
    "electra-large-1.75m": (1.75e6, 2048, 512, 2e-4, 0.25, 335, True),
    "electra-small": (1e6, 128, 128, 5e-4, 0.15, 14, True),
    "electra-small-plus-plus": (4e6, 128, 512, 5e-4, 0.15, 14, True),
    "mdeberta-v3-base": (5e5, 8192, 512, 6e-4, 0.15, 86, False),
}

# Google's totals, with 80 of 512 positions predicted.
FLOPS = {
    "bert-base": 6.428335104e19,
    "bert-small": 1.4187399146496e18,
    "electra-base": 6.424541834277683e19,
    "electra-large": 7.117606040895488e20,
    "electra-large-1.75m": 3.113952642891776e21,
    "electra-small": 1.293743798272e18,
}

# Layers, width and heads of generators.
GENERATORS = {
    "deberta-v3-base": (6, 768, 12),
    "deberta-v3-large": (12, 1024, 16),
    "deberta-v3-small": (3, 768, 12),
    "deberta-v3-xsmall": (6, 384, 6),
    "electra-base": (12, 256, 4),
    "electra-large": (24, 256, 4),
    "electra-large-1.75m": (24, 256, 4),
    "electra-small": (12, 64, 1),
    "electra-small-plus-plus": (12, 256, 4),
    "mdeberta-v3-base": (6, 768, 12),
}


def settings_of(name, small=False, **changes):
    return build(PretrainSettings, {**presets.pretraining_values(name, small), **changes})


def configs_of(name, small=False):
    settings = settings_of(name, small)
    return settings.configs(settings.vocab_size, 0)


def test_names():
    assert presets.names() == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_published_recipes(name):
    settings = settings_of(name)
    keys = ("steps", "batch_size", "sequence_length", "learning_rate", "mask_fraction")
    assert tuple(getattr(settings, key) for key in keys) == TABLE[name][:5]
    beta2 = 0.98 if "v3" in name else 0.999
    optimizer = (10_000, 0.01, 0.9, beta2, 1e-6, 1.0, False)
    keys = (
        "warmup_steps", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm",
        "bias_correction",
    )  # fmt: skip
    assert tuple(getattr(settings, key) for key in keys) == optimizer
    google = name.startswith(("electra", "bert"))
    assert settings.schedule == ("google" if google else "linear")
    assert settings.mask_replacement == name.startswith("electra")
    split = {"electra": (0.85, 0.0)}.get(name.split("-")[0], (0.8, 0.1))
    assert settings.mask_split == ((1.0, 0.0) if "v3" in name else split)
    tie = "embeddings" if name.startswith("electra") else "none"
    assert settings.tie == ("gdes" if "v3" in name else tie)
    assert settings.max_ngram == (3 if name.startswith("deberta") and "v3" not in name else 1)
    assert settings.rtd_weight == 50 and settings.output == f"runs/{name}"
    assert yaml.safe_load(presets.find(name).read_text()).keys() <= vars(settings).keys()


@pytest.mark.parametrize("name", TABLE)
def test_published_sizes(name):
    """As rounded by papers and model cards."""
    generator, discriminator = configs_of(name)
    *_, millions, embeddings = TABLE[name]
    with torch.device("meta"):
        count = Model(discriminator).num_parameters(embeddings)
    assert count / 1e6 == pytest.approx(millions, rel=0.05)
    if name in GENERATORS:
        config = generator
        found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        assert found == GENERATORS[name]
    else:
        assert generator is discriminator


@pytest.mark.parametrize("name", FLOPS)
def test_published_compute(name):
    settings = settings_of(name)
    generator, discriminator = configs_of(name)
    rows = settings.steps * settings.batch_size
    head = "mlm" if generator is discriminator else "rtd"
    total = training_flops(discriminator, settings.sequence_length, rows, head)
    if head == "rtd":
        total += training_flops(generator, settings.sequence_length, rows)
    assert total == pytest.approx(FLOPS[name], rel=1e-9)


def test_encoders():
    """What tells the families apart."""
    fields = ("relative_attention", "position_buckets", "share_att_key", "conv_kernel_size", "emd")
    expected = {
        "electra-base": (False, -1, False, 0, None),
        "deberta-base": (True, -1, False, 0, True),
        "deberta-mt": (True, -1, False, 0, True),
        "deberta-v2-xlarge": (True, 256, True, 3, True),
        "deberta-v3-base": (True, 256, True, 0, None),
    }
    for name, values in expected.items():
        generator, config = configs_of(name)
        assert tuple(getattr(config, field) for field in fields) == values
        assert config.position_biased_input == name.startswith("electra")
        assert bool(generator.emd) == name.startswith("deberta")


# Miniatures

SIZES = {
    *presets.MINIATURE, "output", "discriminator", "generator",
}  # fmt: skip
NETWORK = {
    *presets.MINIATURE_NETWORK, "intermediate_size", "embedding_size", "position_buckets",
    "initializer_range", "vocab_size",
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_miniature_changes_sizes_alone(name):
    full, small = settings_of(name), settings_of(name, True)
    changed = {key for key, value in vars(full).items() if getattr(small, key) != value}
    assert {"steps", "vocab_size", "discriminator"} <= changed <= SIZES
    assert small.output == f"runs/{name}-miniature"
    networks = zip(configs_of(name), configs_of(name, True), strict=True)
    for part, (config, reduced) in zip(("generator", "discriminator"), networks, strict=True):
        changed = {key for key, value in vars(config).items() if getattr(reduced, key) != value}
        assert "hidden_size" in changed and changed <= NETWORK, part
        for key in ("intermediate_size", "embedding_size"):
            ratio = getattr(config, key) / config.hidden_size
            assert getattr(reduced, key) / reduced.hidden_size == pytest.approx(ratio)
    (generator, whole), (less, little) = configs_of(name), configs_of(name, True)
    for key in ("hidden_size", "num_hidden_layers"):
        share = getattr(generator, key) / getattr(whole, key)
        assert getattr(less, key) / getattr(little, key) == share
    heads = little.num_attention_heads * generator.num_attention_heads / whole.num_attention_heads
    assert less.num_attention_heads == max(1, round(heads))
    if little.relative_attention:  # Logarithmic buckets are met within a row.
        assert little.position_buckets < small.sequence_length == little.max_position_embeddings


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A tenth of the embedded text, tokenised once a tokenizer: {kind: directory}."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    articles = islice(wiki_leads(), 1000)
    text.write_text("".join(json.dumps({"text": article.text}) + "\n" for article in articles))
    directories = {}
    for kind in ("wordpiece", "bpe", "unigram"):
        output = str(tmp_path_factory.mktemp(kind))
        values = {"tokenizer_kind": kind, "vocab_size": 400, "held_out": 0.1, "workers": 1}
        values |= {"data": str(text), "output": output}
        prepare(build(PrepareSettings, values))
        directories[kind] = output
    return directories


# One of each algorithm is quick.
QUICK = {"electra-small", "deberta-base", "deberta-v3-small"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TABLE]
)
def test_every_miniature_trains(name, embedded, tmp_path):
    """In 30 steps of half a batch, with a faster rise to the peak, every loss falls."""
    kind = settings_of(name).tokenizer_kind
    changes = {"steps": 30, "warmup_steps": 6, "batch_size": 8, "log_every": 1, "device": "cpu"}
    settings = settings_of(name, True, data=embedded[kind], output=str(tmp_path), **changes)
    task = Pretraining(settings, load_corpus(settings))
    task.evaluate = dict  # The training's losses are what is looked at.
    Trainer(task, settings).run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    names = {key for line in lines for key in line if key.endswith("_loss")}
    expected = {"mlm": {"mlm_loss"}, "mlm+ar": {"mlm_loss", "ar_loss"}}
    assert names == expected.get(settings.objective, {"mlm_loss", "rtd_loss"})
    for loss in names:
        curve = [line[loss] for line in lines if loss in line]
        assert sum(curve[-4:]) < 0.97 * sum(curve[:4]), f"{loss}: {curve}"
        assert all(map(math.isfinite, curve))


# Names, files, the command line


def test_what_a_config_may_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = presets.DIRECTORY / "electra-small.yaml"
    for config in ("electra-small", "electra-small.yaml", "presets/electra-small.yaml"):
        assert presets.find(config) == shipped
        assert presets.pretraining_values(Path(config))["output"] == "runs/electra-small"
    Path("presets").mkdir()
    Path("presets/electra-small.yaml").write_text("steps: 3")
    assert presets.pretraining_values("presets/electra-small.yaml") == {"steps": 3}
    assert presets.pretraining_values("electra-small")["steps"] == 1_000_000
    with pytest.raises(ValueError, match="--miniature takes a preset .*electra-small"):
        presets.pretraining_values("presets/electra-small.yaml", True)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", ["pretrain", "prepare"])
@pytest.mark.parametrize("config", ["electra-tiny", "presets/nope.yaml", "other/electra-small"])
def test_unknown_presets(command, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, command, config)
    assert status == 2 and err.count("\n") == 1
    expected = f"fastdeberta: no such config file: {config}; presets: "
    assert err == expected + ", ".join(sorted(TABLE)) + "\n"


def test_list_of_presets(capsys):
    status, out, _ = run(capsys, "pretrain", "--list-presets")
    assert status == 0 and out.split() == sorted(TABLE)


def test_overrides_win(tmp_path, monkeypatch, capsys):
    """Over the miniature's values, and those over the preset's."""
    seen = []
    monkeypatch.setattr(
        "fastdeberta.pretraining.task.pretrain",
        lambda settings, progress: seen.append(settings) or {},
    )
    pairs = ("steps=7", "discriminator.hidden_size=48", "mask_fraction=0.3")
    for small in ((), ("--miniature",)):
        assert run(capsys, "pretrain", "presets/electra-base.yaml", *small, *pairs)[0] == 0
    full, miniature = seen
    for settings in seen:
        assert (settings.steps, settings.mask_fraction) == (7, 0.3)
        assert settings.discriminator["hidden_size"] == 48
    assert (full.batch_size, full.discriminator["num_hidden_layers"]) == (256, 12)
    assert (miniature.batch_size, miniature.discriminator["num_hidden_layers"]) == (16, 4)


def test_prepare_takes_a_presets_tokenizer(tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("\n\n".join(tiny.documents()))
    pairs = (f"data={text}", f"output={output}", "vocab_size=120", "held_out=0.2", "workers=1")
    status, out, err = run(capsys, "prepare", "presets/electra-small.yaml", *pairs)
    assert status == 0, err
    assert f"written: {output}" in out
    made = read_meta(output)["made_from"]
    assert (made["tokenizer_kind"], made["lowercase"]) == ("wordpiece", True)
    assert made["vocab_size"] == 120 and made["held_out"] == 0.2
    values = presets.preparation_values("deberta-base")
    assert values == {key: load_yaml(presets.find("deberta-base"))[key] for key in presets.TEXT}
    assert (values["vocab_size"], values["tokenizer_kind"]) == (50265, "bpe")
