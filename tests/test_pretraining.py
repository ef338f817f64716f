"""Pre-training: what is tied, scores, the task, its settings, and short runs of all objectives."""

import json
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastdeberta import tokenizer as tokenizers
from fastdeberta.models import Model, from_pretrained
from fastdeberta.pretraining.batches import CAUSAL, DISCRIMINATOR, GENERATOR, POLICY
from fastdeberta.pretraining.combinations import (
    ALGORITHMS,
    GENERATORS,
    OBJECTIVES,
    REFUSALS,
    check_combination,
)
from fastdeberta.pretraining.corpus import Corpus, baselines, load_corpus, starts_word
from fastdeberta.pretraining.examples import Rows
from fastdeberta.pretraining.prepare import PrepareSettings, prepare
from fastdeberta.pretraining.scores import auc, rtd_accuracies, scores
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.pretraining.task import Pretraining, pretrain
from fastdeberta.pretraining.tying import (
    TIES,
    DeltaEmbedding,
    check_same_size,
    copy_encoder,
    tie_weights,
    untied,
)
from fastdeberta.training.accounting import training_flops
from fastdeberta.training.draws import Draws
from fastdeberta.training.reporting import read_metrics
from fastdeberta.training.settings import build
from fastdeberta.training.trainer import Trainer

PAD, CLS, SEP, UNK, MASK = range(5)

# Tokenizers


def test_tokenizer_is_deterministic():
    again = tokenizers.train(tiny.documents(), 120)
    assert again.to_str() == tiny.tokenizer().to_str()
    assert tokenizers.train(tiny.documents(60), 120).to_str() != again.to_str()


def test_tokenizer():
    tokenizer = tiny.tokenizer()
    assert [tokenizer.token_to_id(token) for token in tokenizers.SPECIAL_TOKENS] == list(range(5))
    assert 50 < tokenizer.get_vocab_size() <= 120
    for document in tiny.documents(10):
        assert tokenizer.decode(tokenizer.encode(document).ids) == document
    assert tokenizer.decode(tokenizer.encode("  The  old\tcrab\n").ids) == "The old crab"
    single, both = tokenizer.encode("The crab"), tokenizer.encode("The crab", "The owl")
    ids = single.ids[1:-1]
    assert single.ids == [CLS, *ids, SEP] and MASK not in ids
    assert both.ids[: len(ids) + 2] == single.ids and both.ids[-1] == SEP
    assert both.type_ids == [0] * (len(ids) + 2) + [1] * (len(both.ids) - len(ids) - 2)
    assert UNK in tokenizer.encode("\u4e2d").ids


def test_lowercase_tokenizer():
    tokenizer = tokenizers.train(tiny.documents(), 120, lowercase=True)
    assert tokenizer.encode("THE CRAB").ids == tokenizer.encode("the crab").ids
    assert tiny.tokenizer().encode("THE CRAB").ids != tiny.tokenizer().encode("the crab").ids


def test_tokenizer_files(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizers.save(tokenizer, tmp_path)
    ours = [tokenizers.load(path) for path in (tmp_path, tmp_path / "tokenizer.json")]
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for document in tiny.documents(20):
        expected = tokenizer.encode(document).ids
        assert [loaded.encode(document).ids for loaded in ours] == [expected] * 2
        assert theirs(document)["input_ids"] == expected
    names = ("pad", "cls", "sep", "unk", "mask")
    assert [getattr(theirs, f"{name}_token_id") for name in names] == list(range(5))


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 100, got 99"):
        tokenizers.train(["text"], 99)
    with pytest.raises(FileNotFoundError, match="no such file: .*tokenizer.json"):
        tokenizers.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer: "):
        tokenizers.load(tmp_path)
    path.write_text(tiny.tokenizer().to_str().replace("[MASK]", "[OTHER]"))
    with pytest.raises(ValueError, match=r"the tokenizer has no \[MASK\] token"):
        tokenizers.load(path)


def test_tokens_that_start_a_word():
    for kind, expected in (("unigram", "\u2581"), ("bpe", "\u0120"), ("wordpiece", "")):
        tokenizer = tokenizers.train(tiny.documents(), 300, kind=kind)
        table = starts_word(tokenizer)
        assert len(table) == tokenizer.get_vocab_size() and table.any() and not table.all()
        ids = tokenizer.encode("the old crab swims", add_special_tokens=False).ids
        assert int(table[ids].sum()) in (3, 4), "a first word need not have a space before it"
        for token, index in tokenizer.get_vocab().items():
            first = token.startswith(expected) if expected else not token.startswith("##")
            assert table[index] == first


# Tying


def networks(tie="embeddings", family="deberta-v2", changes=(), generator=(), head="rtd"):
    config = tiny.config(family, **dict(changes))
    ours, theirs = Model(replace(config, **dict(generator)), "mlm"), Model(config, head)
    tie_weights(ours, theirs, tie)
    return tiny.randomize(ours), tiny.randomize(theirs)


def shared(ours, theirs):
    found = {id(p) for p in ours.parameters()}
    return [name for name, p in theirs.named_parameters() if id(p) in found]


def batch(length=40):
    """Rows of 40 tokens (30 of the second) between [CLS] and [SEP], and their mask."""
    ids = tiny.token_ids(3, length)
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[1, 30:] = PAD
    return ids, ids != PAD


def test_tie_none():
    assert not shared(*networks("none", generator={"hidden_size": 16, "embedding_size": 16}))


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_tie_embeddings(family):
    ours, theirs = networks(
        "embeddings", family, {"type_vocab_size": 2, "position_biased_input": True}
    )
    expected = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    names = [f"backbone.embeddings.{name}.weight" for name in expected]
    if family == "electra":  # As in Google's code.
        names += [f"backbone.embeddings.LayerNorm.{part}" for part in ("weight", "bias")]
    assert shared(ours, theirs) == names


@pytest.mark.parametrize("head", ["rtd", "mlm"])
@pytest.mark.parametrize("changes", [{}, {"emd": True}, {"embedding_size": 20}])
def test_tie_all(changes, head):
    """Every weight of the encoder; a head is nobody else's."""
    ours, theirs = networks("all", changes=changes, head=head)
    own = {name for name, _ in theirs.named_parameters()} - set(shared(ours, theirs))
    assert own == {f"head.{name}" for name, _ in theirs.head.named_parameters()}
    assert (theirs.backbone.embeddings.position_embeddings is None) == (
        head == "rtd" or not changes.get("emd")
    )
    exported = untied(theirs).eval()
    assert torch.equal(exported(*batch()).logits, theirs.eval()(*batch()).logits)


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_tie_gdes(family):
    ours, theirs = networks("gdes", family, {"position_biased_input": True})
    assert not shared(ours, theirs)
    ours, theirs = ours.backbone.embeddings, theirs.backbone.embeddings
    for name in ("word_embeddings", "position_embeddings"):
        assert isinstance(getattr(theirs, name), DeltaEmbedding)
    with torch.no_grad():
        ours.word_embeddings.weight += 1  # The discriminator follows its generator's table.
    expected = ours.word_embeddings.weight + theirs.word_embeddings._weight
    torch.testing.assert_close(theirs.word_embeddings.weight, expected)
    ids = tiny.token_ids(2, 3)
    torch.testing.assert_close(theirs.word_embeddings(ids), expected[ids])


def test_gdes_starts_at_the_generators_table():
    ours, theirs = Model(tiny.config(), "mlm"), Model(tiny.config(), "rtd")
    tie_weights(ours, theirs, "gdes")
    delta = theirs.backbone.embeddings.word_embeddings
    assert not delta._weight.any() and delta.num_embeddings == 67
    assert torch.equal(delta.weight, ours.backbone.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_exported_discriminator(tie, family, tmp_path):
    _, theirs = networks(tie, family, {"position_biased_input": True})
    exported = untied(theirs.eval()).eval()
    assert all(isinstance(m, nn.Embedding) for m in exported.modules() if hasattr(m, "padding_idx"))
    expected = theirs(*batch()).logits
    assert torch.equal(exported(*batch()).logits, expected)
    exported.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path, "rtd").eval()(*batch()).logits, expected)
    own = {p.data_ptr() for p in theirs.parameters()}
    assert not own & {p.data_ptr() for p in exported.parameters()}, "a copy, not a view"


@pytest.mark.parametrize("tie", ["embeddings", "gdes"])
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_narrower_generator(tie, family):
    size = tiny.config(family).embedding_size
    narrow = {"hidden_size": 16, "intermediate_size": 32, "embedding_size": size}
    ours, _ = networks(tie, family, generator=narrow | {"num_hidden_layers": 1})
    assert ours.backbone.embeddings.embed_proj.weight.shape == (16, size)


@pytest.mark.parametrize("tie", ["embeddings", "gdes"])
@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            {"hidden_size": 16, "embedding_size": 16},
            r"word_embeddings .*has \[67, 16\], .*\[67, 32\]",
        ),
        ({"vocab_size": 70}, r"word_embeddings of one shape: .* \[70, 32\], .* \[67, 32\]"),
        ({"max_position_embeddings": 50}, r"position_embeddings of .* \[50, 32\], .* \[48, 32\]"),
    ],
)
def test_tables_that_cannot_be_tied(tie, generator, message):
    with pytest.raises(ValueError, match=f"tie='{tie}' needs {message}"):
        networks(tie, changes={"position_biased_input": True}, generator=generator)


@pytest.mark.parametrize(
    "generator",
    [
        {"num_hidden_layers": 2},
        {"intermediate_size": 32},
        {"hidden_size": 16},
        {"conv_kernel_size": 3},
    ],
)
def test_networks_of_two_sizes_cannot_be_one(generator):
    with pytest.raises(ValueError, match="tie='all' needs a generator of the discriminator's size"):
        networks("all", generator=generator)


@pytest.mark.parametrize("tie", ["none", "gdes"])
@pytest.mark.parametrize("changes", [{}, {"emd": True}])
def test_the_second_stage_starts_from_the_generator(tie, changes):
    ours, theirs = networks(tie, changes=changes)
    check_same_size(ours, Model(theirs.config, "rtd"), "x")
    heads = [p.clone() for p in theirs.head.parameters()]
    copy_encoder(ours, theirs)
    plain = Model(replace(ours.config, emd=False), "base").eval()
    plain.load_state_dict(ours.state_dict(), strict=False)
    states = theirs.eval()(*batch()).last_hidden_state
    assert torch.equal(states, plain(*batch()).last_hidden_state)
    assert all(map(torch.equal, heads, theirs.head.parameters())), "heads differ in kind"


def test_a_head_of_the_same_kind_is_copied_too():
    ours, theirs = networks("none", head="mlm")
    copy_encoder(ours, theirs)
    assert torch.equal(ours(*batch()).logits, theirs(*batch()).logits)


# Scores


def rows_of(tokens):
    class Source:
        def __len__(self):
            return len(tokens)

        def __getitem__(self, rows):
            return Rows(tokens[rows])

    return Source()


def test_baselines():
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 10)
    train = rows_of(torch.tensor([[CLS, 5, 5, 5, 6, SEP], [CLS, 6, 7, 5, SEP, PAD]]))
    held_out = rows_of(torch.tensor([[CLS, 5, 6, 6, 8, SEP]]))
    scores = baselines(Corpus(tokenizer, train, held_out), [PAD, CLS, SEP, MASK])
    assert scores["most_frequent"] == pytest.approx(1 / 4)
    assert scores["unigram"] == pytest.approx(4 / 7 * 1 / 4 + 2 / 7 * 2 / 4)


def test_rtd_accuracies():
    replaced = torch.tensor([1, 0, 0, 1, 0]).bool()
    scores = rtd_accuracies(torch.tensor([3.0, 1.0, 2.0, 0.0, -1.0]), replaced)
    assert scores == {  # Two were replaced, so the two highest are flagged: one is right.
        "rtd_accuracy_replaced": pytest.approx(1 / 2),
        "rtd_accuracy_original": pytest.approx(2 / 3),
        "replaced_fraction": pytest.approx(2 / 5),
    }
    perfect = rtd_accuracies(replaced.float(), replaced)
    assert perfect["rtd_accuracy_replaced"] == perfect["rtd_accuracy_original"] == 1


def test_ignorant_discriminator_scores_the_replaced_fraction():
    replaced = torch.rand(20_000) < 0.15
    scores = rtd_accuracies(torch.randn(20_000), replaced)
    fraction = scores["replaced_fraction"]
    assert scores["rtd_accuracy_replaced"] == pytest.approx(fraction, abs=0.03)
    assert scores["rtd_accuracy_original"] == pytest.approx(1 - fraction, abs=0.03)


def test_auc():
    """Against scikit-learn's, with ties and without."""
    replaced = torch.rand(500) < 0.2
    logits = torch.randn(500) + replaced
    for values in (logits, logits.round(), torch.zeros(500)):
        assert auc(values, replaced) == pytest.approx(roc_auc_score(replaced, values), abs=1e-12)


def test_scores():
    result = scores(
        {
            "mlm_loss": torch.tensor([1.0, 3.0]),
            "mlm_accuracy": torch.tensor([1.0, 0.0]),
            "ar_loss": torch.tensor([2000.0]),
            "rtd_loss": torch.tensor([0.5]),
            "none": torch.empty(0),
            "rtd_logit": torch.tensor([0.1, 0.2]),
            "replaced": torch.tensor([False, False]),
        }
    )
    assert result["mlm_loss"] == 2 and result["mlm_accuracy"] == 0.5
    assert result["mlm_perplexity"] == pytest.approx(math.exp(2))
    assert math.isfinite(result["ar_perplexity"]), "JSON has no infinity"
    assert not {"none", "rtd_auc", "rtd_perplexity", "rtd_accuracy_replaced"} & result.keys()
    assert result["rtd_accuracy_original"] == 1


# The task


def settings_of(tmp_path, **changes):
    """Settings of a run on a tiny text."""
    data = tmp_path / "text.txt"
    if not data.exists():
        data.write_text("\n\n".join(tiny.documents()))
    values = {
        "output": str(tmp_path / "run"),
        "data": str(data),
        "device": "cpu",
        "vocab_size": 120,
        "sequence_length": 24,
        "held_out": 0.1,
        "batch_size": 8,
        "steps": 4,
        "warmup_steps": 1,
        "learning_rate": 0.003,
        "discriminator": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "position_buckets": 8,
            "max_relative_positions": 16,
        },
    }
    changes = {**changes}
    more = changes.pop("discriminator", {})
    values["discriminator"] = values["discriminator"] | more
    return build(PretrainSettings, values | changes)


def task_of(tmp_path, **changes):
    settings = settings_of(tmp_path, **changes)
    return Pretraining(settings, load_corpus(settings))


def first_batch(task, step=0, count=8):
    return task.batch(torch.arange(count), Draws(0, step, 0, count, count))


@pytest.mark.parametrize(
    ("tie", "algorithm"),
    [*((tie, "joint") for tie in TIES), ("gdes", "adversarial"), ("embeddings", "adversarial")],
)
def test_parameter_groups(tie, algorithm, tmp_path):
    task = task_of(tmp_path, tie=tie, algorithm=algorithm, generator_learning_rate=0.5)
    groups = task.parameter_groups()
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted({id(p) for p in task.model.parameters()}), "each once"
    generator = {id(p) for p in task.objective.generator.parameters()}
    if algorithm == "adversarial":
        generator |= {id(p) for p in task.objective.baseline.parameters()}
    for group in groups:
        own = group["network"] == "generator"
        assert group["peak_lr"] == (0.5 if own else 0.003)
        assert all((id(p) in generator) == own for p in group["params"])


def test_generators_own_optimiser(tmp_path):
    """Microsoft's two trainers as groups of one optimiser."""
    own = {"warmup_steps": 7, "schedule": "constant", "max_grad_norm": 0.5}
    task = task_of(
        tmp_path, generator_weight_decay=0.2, **{f"generator_{k}": v for k, v in own.items()}
    )
    for group in task.parameter_groups():
        mine = group["network"] == "generator"
        assert {k: group[k] for k in own if k in group} == (own if mine else {})
        assert group["weight_decay"] in (0.0, 0.2 if mine else 0.01)


def test_stages_have_schedules_of_their_own(tmp_path):
    task = task_of(tmp_path, algorithm="two_stage", steps=10, generator_steps=4)
    found = {g["network"]: (g["first_step"], g["steps"]) for g in task.parameter_groups()}
    assert found == {"generator": (0, 4), "discriminator": (4, 6)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [("", {"mlm_loss": 1, "rtd_loss": 50})] * 3),
        ({"rtd_weight": 7, "objective": "electra_15"}, [("", {"mlm_loss": 1, "rtd_loss": 7})] * 3),
        ({"objective": "mlm"}, [("", {"mlm_loss": 1})] * 3),
        (
            {"objective": "mlm+ar"},
            [("", {"mlm_loss": 1}), (CAUSAL, {"ar_loss": 1}), ("", {"mlm_loss": 1})],
        ),
        ({"generator_type": "unigram"}, [("", {"rtd_loss": 50})] * 3),
        (
            {"algorithm": "two_stage", "generator_steps": 2, "objective": "replace_mlm"},
            [(GENERATOR, {"mlm_loss": 1})] * 2 + [(DISCRIMINATOR, {"replace_mlm_loss": 1})],
        ),
        (
            {"algorithm": "adversarial", "warm_start_steps": 1},
            [("", {"mlm_loss": 1, "rtd_loss": 50, "baseline_loss": 1})]
            + [(POLICY, {"rtd_loss": 50, "baseline_loss": 1, "policy_loss": 1})] * 2,
        ),
    ],
)
def test_phases_and_weights(changes, expected, tmp_path):
    task = task_of(tmp_path, **changes)
    for step, (phase, weights) in enumerate(expected):
        made = first_batch(task, step)
        assert made.phase == phase and task.weights(step) == weights
        sums = task.model(made)
        assert weights.keys() <= sums.keys() == task.counts(made).keys()
        trained = {name for name in sums if sums[name].requires_grad}
        assert trained == weights.keys()


def test_loss_of_a_step_by_hand(tmp_path):
    """What the trainer logs: sums over two unequal micro-batches, divided by all that counted."""
    task = task_of(tmp_path, rtd_weight=7.0, steps=1, batch_size=7, accumulation=2, log_every=1)
    task.model.eval()  # Dropout is zero in neither network; the trainer's is switched off below.
    for part in task.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    seen = []
    forward = task.model.forward
    task.model.forward = lambda made: (seen.append(made), forward(made))[1]
    expected = {}

    def note(task_begin=task.begin):
        def begin(step):
            task_begin(step)
            expected["state"] = {k: v.clone() for k, v in task.model.state_dict().items()}

        return begin

    task.begin = note()
    Trainer(task, task.settings).run()
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    logged = [line for line in logged if "loss" in line][0]
    task.model.load_state_dict(expected["state"])
    batches = seen[:2]
    assert [len(b.input_ids) for b in batches] == [3, 4]
    with torch.no_grad():
        sums = [forward(b) for b in batches]
    chosen = sum(len(b.positions) for b in batches)
    real = sum(b.tokens for b in batches)
    mlm = sum(s["mlm_loss"].item() for s in sums) / chosen
    rtd = sum(s["rtd_loss"].item() for s in sums) / real
    assert logged["mlm_loss"] == pytest.approx(mlm, rel=1e-5)
    assert logged["rtd_loss"] == pytest.approx(rtd, rel=1e-5)
    assert logged["loss"] == pytest.approx(mlm + 7 * rtd, rel=1e-5)


def test_the_second_stage_copies_once(tmp_path):
    task = task_of(tmp_path, algorithm="two_stage", tie="none", steps=6, generator_steps=3)
    theirs = task.objective.discriminator.backbone.encoder.layer[0].intermediate.dense.weight
    ours = task.objective.generator.backbone.encoder.layer[0].intermediate.dense.weight
    for step in (0, 2, 4):
        task.begin(step)
        assert not torch.equal(ours, theirs)
    task.begin(3)
    task.begin(3)
    assert torch.equal(ours, theirs)


def test_two_stages_need_one_size(tmp_path):
    message = "algorithm='two_stage' needs a generator of the discriminator's size"
    with pytest.raises(ValueError, match=message):
        task_of(tmp_path, algorithm="two_stage", tie="gdes", generator={"intermediate_size": 32})


def test_samples_of_a_generator_without_a_network(tmp_path):
    """Unigram: as often as in the text; uniform: all alike; special tokens: never."""
    for kind in ("unigram", "uniform"):
        task = task_of(tmp_path, generator_type=kind, batch_size=64, mask_fraction=0.9)
        drawn = [first_batch(task, step, 60) for step in range(10)]
        tokens = torch.cat([b.inputs.flatten()[b.positions] for b in drawn])
        size = task.corpus.tokenizer.get_vocab_size()
        counts = tokens.bincount(minlength=size).double()
        assert not counts[[PAD, CLS, SEP, MASK]].any()
        cumulative = task.corruption.proposals
        p = cumulative.diff(prepend=torch.zeros(1)) / cumulative[-1]
        expected = p * len(tokens)
        often = expected > 20
        deviation = ((counts - expected).square() / expected)[often].sum()
        assert deviation < 1.6 * often.sum() and often.sum() > 20
        assert (p[often].max() > 3 * p[often].min()) == (kind == "unigram")


def test_compute(tmp_path):
    task = task_of(tmp_path, algorithm="two_stage", steps=6, generator_steps=3)
    config = task.objective.generator.config
    for step in (0, 3):
        made = first_batch(task, step)
        chosen = len(made.positions) / made.tokens
        mlm = training_flops(config, 24, 8, "mlm", chosen)
        rtd = training_flops(config, 24, 8, "rtd")
        assert made.tokens == 8 * 24
        expected = mlm if step == 0 else mlm / 2 + rtd
        assert task.compute(made) == pytest.approx(expected, rel=1e-12)
    made = first_batch(task_of(tmp_path, objective="mlm"), count=8)
    deep = task_of(tmp_path, objective="mlm", discriminator={"num_hidden_layers": 2})
    decoder = {"num_hidden_layers": 2, "emd": True}
    passes = task_of(tmp_path, objective="mlm", discriminator=decoder)
    three = task_of(tmp_path, objective="mlm", discriminator={"num_hidden_layers": 3})
    assert deep.compute(made) < passes.compute(made) == three.compute(made)


@torch.no_grad()
def test_scores_of_an_untrained_pair(tmp_path):
    task = task_of(tmp_path)
    task.model.eval()
    first, again = task.evaluate(), task.evaluate()
    assert first == again, "one corruption for every evaluation"
    size = task.corpus.tokenizer.get_vocab_size()
    assert 0 <= first["mlm_accuracy"] < 0.3
    assert first["mlm_loss"] == pytest.approx(math.log(size), abs=0.5)
    assert first["mlm_perplexity"] == pytest.approx(math.exp(first["mlm_loss"]))
    assert 0.3 < first["rtd_auc"] < 0.7
    assert 0.05 < first["replaced_fraction"] < 0.16


def test_evaluation_has_random_numbers_of_its_own(tmp_path):
    """No training step corrupts a row as evaluation does."""
    task = task_of(tmp_path)
    (held_out,) = task._held_out()
    task.corpus = task.corpus._replace(train=task.corpus.held_out)
    count = len(task.corpus.held_out)
    for step in range(3):
        made = first_batch(task, step, count)
        assert torch.equal(made.input_ids, held_out.input_ids)
        assert not torch.equal(made.positions, held_out.positions)


@pytest.mark.parametrize("layout", ["stream", "segments", "packed"])
@pytest.mark.parametrize("kind", ["text", "prepared"])
def test_layouts(layout, kind, tmp_path):
    """Rows of every layout train, from a text and from what `prepare` wrote."""
    settings = settings_of(tmp_path, layout=layout, steps=3, sequence_length=32)
    if kind == "prepared":
        directory = str(tmp_path / "prepared")
        values = {"output": directory, "data": settings.data, "held_out": 0.1, "vocab_size": 120}
        prepare(build(PrepareSettings, values | {"workers": 1}))
        settings.data = directory
    settings.discriminator["type_vocab_size"] = 2
    task = Pretraining(settings, load_corpus(settings))
    made = first_batch(task)
    assert (made.cu_seqlens is None) == (layout != "packed")
    assert (made.token_type_ids is None) == (layout != "segments")
    result = Trainer(task, settings).run()
    assert result["step"] == 3 and math.isfinite(result["mlm_loss"])


def test_a_short_run_learns_and_leaves_loadable_models(tmp_path):
    task = task_of(tmp_path)
    with torch.no_grad():
        task.model.eval()
        before = task.evaluate()
    result = pretrain(settings_of(tmp_path, steps=80))
    assert result["mlm_loss"] < before["mlm_loss"] - 0.5
    assert result["step"] == 80 and result["tokens"] > 80 * 8 * 20 and result["flops"] > 0
    assert result["parameters"]["generator"]["total"] > 0
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert written["baseline"] == result["baseline"] and 0 < result["baseline"]["unigram"] < 1
    for head, name in (("mlm", "generator"), ("rtd", "discriminator")):
        directory = tmp_path / "run" / name
        model = from_pretrained(directory, head)
        assert model.config.vocab_size == tokenizers.load(directory).get_vocab_size()


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "electra", "emd"])
@pytest.mark.parametrize("objective", ["electra", "replace_mlm", "mlm"])
def test_exports_load(objective, family, tmp_path):
    """In transformers too, where it has the class: it knows no mask decoder, and of detectors of
    replaced tokens ELECTRA's alone."""
    encoder = {"model_type": "deberta-v2" if family == "emd" else family}
    if family == "emd":
        encoder |= {"emd": True, "num_hidden_layers": 2}
    task = task_of(tmp_path, objective=objective, discriminator=encoder)
    tiny.randomize(task.model)
    task.export(tmp_path)
    ids = task.corpus.train[torch.arange(3)].input_ids
    for name, model in task.objective.models().items():
        expected = model(ids).logits
        loaded = from_pretrained(tmp_path / name, model.head_name).eval()
        torch.testing.assert_close(loaded(ids).logits, expected)
        assert bool(loaded.config.emd) == (family == "emd" and model.head_name == "mlm")
        if family == "emd":
            continue
        if model.head_name == "mlm":
            theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / name)
        elif family == "electra":
            theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / name)
        else:
            theirs = transformers.AutoModel.from_pretrained(tmp_path / name)
            expected = model(ids).last_hidden_state
        with torch.no_grad():
            found = theirs.eval()(ids)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# Combinations

COMBINATIONS = list(product(OBJECTIVES, ALGORITHMS, TIES, GENERATORS))


def reason_against(*combination):
    try:
        check_combination(*combination)
    except ValueError as error:
        return str(error)
    return None


ALLOWED = [c for c in COMBINATIONS if reason_against(*c) is None]
QUICK = {("electra", "joint", "gdes", "network"), ("mlm+ar", "joint", "none", "network")}


def test_what_is_allowed():
    """Of each objective the ties of each algorithm; generators without a network are joint."""
    pairs = {"joint": set(TIES), "two_stage": {"none", "gdes"}}
    detection = pairs | {"adversarial": {"none", "embeddings", "gdes"}}
    expected = {
        "electra": detection,
        "electra_15": detection,
        "replace_mlm": pairs,
        "all_tokens_mlm": pairs,
        "mlm": {"joint": {"none"}},
        "mlm+ar": {"joint": {"none"}},
    }
    allowed = {
        (objective, algorithm, tie, "network")
        for objective, algorithms in expected.items()
        for algorithm, ties in algorithms.items()
        for tie in ties
    }
    allowed |= {
        (objective, "joint", "none", kind)
        for objective in ("electra", "electra_15", "replace_mlm", "all_tokens_mlm")
        for kind in ("unigram", "uniform")
    }
    assert set(ALLOWED) == allowed


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c not in ALLOWED])
def test_refused_combinations(combination):
    keys = ("objective", "algorithm", "tie", "generator_type")
    with pytest.raises(ValueError, match=r"do not go together: \w+") as error:
        build(PretrainSettings, dict(zip(keys, combination, strict=True)))
    assert any(str(error.value).endswith(refusal.reason) for refusal in REFUSALS)


def test_every_refusal_is_met():
    met = {reason_against(*c).split("together: ")[1] for c in COMBINATIONS if c not in ALLOWED}
    assert met == {refusal.reason for refusal in REFUSALS}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded text with a small tokenizer, tokenised once."""
    output = tmp_path_factory.mktemp("embedded")
    values = {"output": str(output), "held_out": 0.9, "vocab_size": 300, "workers": 1}
    prepare(build(PrepareSettings, values))
    return str(output)


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "position_buckets": 8,
    "max_relative_positions": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(c, id="-".join(c), marks=() if c in QUICK else pytest.mark.slow)
        for c in ALLOWED
    ],
)
def test_every_combination_trains(combination, embedded, tmp_path):
    """50 steps on the embedded text: the last steps' losses are below the first steps' (in the
    adversarial game that of the discriminator)."""
    objective, algorithm, tie, kind = combination
    settings = build(
        PretrainSettings,
        {
            "objective": objective,
            "algorithm": algorithm,
            "tie": tie,
            "generator_type": kind,
            "data": embedded,
            "output": str(tmp_path),
            "device": "cpu",
            "sequence_length": 32,
            "batch_size": 16,
            "steps": 50,
            "warmup_steps": 5,
            "schedule": "constant",
            "learning_rate": 0.003,
            "log_every": 1,
            "discriminator": TINY,
        },
    )
    task = Pretraining(settings, load_corpus(settings))
    task.evaluate = dict  # The training's losses are what is looked at.
    Trainer(task, settings).run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    game = {"mlm_loss", "policy_loss", "baseline_loss"} if algorithm == "adversarial" else set()
    names = {name for line in lines for name in line if name.endswith("_loss")} - game
    assert names
    for name in names:
        curve = [line[name] for line in lines if name in line]
        if algorithm == "two_stage":  # Each network's own half; a frozen generator stays.
            curve = curve[:25] if name == "mlm_loss" else curve
        assert sum(curve[-5:]) < sum(curve[:5]), f"{name}: {curve}"


ENCODERS = {
    "v1": {"model_type": "deberta"},
    "v2": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "electra": {"model_type": "electra", "embedding_size": 16},
    "emd": {"emd": True},
    "emd-without-c2p": {"emd": True, "pos_att_type": ["p2c"]},
    "without-p2c": {"pos_att_type": ["c2p"]},
    "without-both": {
        "relative_attention": False,
        "norm_rel_ebd": "none",
        "position_biased_input": True,
    },
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_trains(encoder, tmp_path):
    for objective in OBJECTIVES:
        changes = TINY | ENCODERS[encoder]
        if objective == "mlm+ar" and encoder == "v2":
            with pytest.raises(ValueError, match="needs discriminator.conv_kernel_size = 0"):
                task_of(tmp_path, objective=objective, discriminator=changes)
            continue
        task = task_of(tmp_path, objective=objective, discriminator=changes, max_ngram=2)
        for step in range(2):
            made = first_batch(task, step)
            weights, counts = task.weights(step), task.counts(made)
            sums = task.model(made)
            sum(weights[name] * sums[name] / counts[name] for name in weights).backward()
        unreached = [n for n, p in task.model.named_parameters() if p.grad is None]
        assert unreached == []


# Settings


def write_tokenizer(path, **options):
    path.mkdir(exist_ok=True)
    tokenizers.save(tokenizers.train(tiny.documents(), **options), path)
    return str(path)


def test_a_run_keeps_its_tokenizer(tmp_path):
    """Once it has a checkpoint; a run that failed before is started anew."""
    first = load_corpus(settings_of(tmp_path)).tokenizer
    other = load_corpus(settings_of(tmp_path, lowercase=True)).tokenizer
    assert other.to_str() != first.to_str()
    (tmp_path / "run" / "checkpoint-3").mkdir()
    given = write_tokenizer(tmp_path / "given", vocab_size=110)
    for changes in ({}, {"tokenizer": given}):
        kept = load_corpus(settings_of(tmp_path, **changes)).tokenizer
        assert kept.to_str() == other.to_str()
        assert tokenizers.load(tmp_path / "run").to_str() == other.to_str()


def test_a_given_tokenizer(tmp_path):
    given = write_tokenizer(tmp_path / "given", vocab_size=110, lowercase=True)
    tokenizer = load_corpus(settings_of(tmp_path, tokenizer=given)).tokenizer
    for document in tiny.documents(5):
        expected = tokenizers.load(given).encode(document).ids
        assert tokenizer.encode(document).ids == expected


def test_one_document_is_too_few(tmp_path):
    (tmp_path / "text.txt").write_text("one document")
    with pytest.raises(ValueError, match="holds one document; at least two are needed"):
        load_corpus(settings_of(tmp_path))


def test_configs():
    settings = build(
        PretrainSettings,
        {
            "discriminator": {"hidden_size": 64, "layer_norm_eps": "1e-6", "pos_att_type": "c2p"},
            "generator": {"hidden_size": 32, "num_attention_heads": 2},
        },
    )
    generator, discriminator = settings.configs(vocab_size=99, pad_token_id=3)
    assert (generator.hidden_size, discriminator.hidden_size) == (32, 64)
    assert generator.embedding_size == discriminator.embedding_size == 64
    assert generator.layer_norm_eps == discriminator.layer_norm_eps == 1e-6
    assert generator.pos_att_type == ["c2p"] and generator.num_attention_heads == 2
    for config in (generator, discriminator):
        assert (config.vocab_size, config.pad_token_id) == (99, 3)


def test_families_are_themselves():
    """A config that names a family alone gets no other family's positions."""
    expected = {
        "electra": (False, [], -1, "none", 1e-12),
        "deberta": (True, ["c2p", "p2c"], -1, "none", 1e-7),
        "deberta-v2": (True, ["p2c", "c2p"], 256, "layer_norm", 1e-7),
    }
    for family, values in expected.items():
        _, config = build(PretrainSettings, {"discriminator": {"model_type": family}}).configs(9, 0)
        assert config.model_type == family and config.hidden_size == 256
        names = ("relative_attention", "pos_att_type", "position_buckets", "norm_rel_ebd")
        assert tuple(getattr(config, n) for n in (*names, "layer_norm_eps")) == values


def test_sizes_of_generators():
    """A fraction of the width, half of the depth, and what `generator` says after both."""
    values = {
        "generator_width": 0.25,
        "generator_half_depth": True,
        "generator": {"intermediate_size": 100, "pos_att_type": "c2p"},
    }
    generator, discriminator = build(PretrainSettings, values).configs(99, 0)
    assert (generator.hidden_size, generator.num_attention_heads) == (64, 1)
    assert (generator.num_hidden_layers, discriminator.num_hidden_layers) == (3, 6)
    assert generator.embedding_size == 256 and generator.intermediate_size == 100
    assert generator.pos_att_type == ["c2p"] and discriminator.pos_att_type == ["p2c", "c2p"]


def test_a_generator_that_is_not_there_has_no_config():
    decoder = {"discriminator": {"emd": True}, "generator": {"num_hidden_layers": 1}}
    with pytest.raises(ValueError, match="emd needs num_hidden_layers >= 2"):
        build(PretrainSettings, decoder).configs(99, 0)
    for values in ({"objective": "mlm+ar"}, {"generator_type": "unigram"}):
        generator, discriminator = build(PretrainSettings, decoder | values).configs(99, 0)
        assert generator is discriminator


@pytest.mark.parametrize(
    ("values", "split"),
    [
        ({}, (1.0, 0.0)),
        ({"objective": "mlm"}, (0.8, 0.1)),
        ({"objective": "mlm", "mask_token_fraction": 1.0}, (1.0, 0.0)),
        ({"mask_token_fraction": 0.85}, (0.85, 0.0)),
    ],
)
def test_mask_split_of_objectives(values, split):
    assert build(PretrainSettings, values).mask_split == split


def test_an_older_config_means_what_it_meant():
    settings = build(PretrainSettings, {"tie": "embeddings", "rtd_weight": 20.0})
    assert (settings.objective, settings.algorithm) == ("electra", "joint")
    for values, tie in (
        ({}, "gdes"),
        ({"objective": "mlm"}, "none"),
        ({"generator_type": "uniform"}, "none"),
    ):
        assert build(PretrainSettings, values).tie == tie


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tie": "half"}, "tie must be one of none, embeddings, all, gdes; got 'half'"),
        ({"objective": "bert"}, "objective must be one of electra, .*, mlm, mlm.ar; got 'bert'"),
        ({"algorithm": "x"}, "algorithm must be one of joint, two_stage, adversarial; got 'x'"),
        ({"generator_type": "x"}, "generator_type must be one of network, unigram, uniform"),
        ({"generator_schedule": "x"}, "generator_schedule must be one of linear, "),
        ({"sampling": "x"}, "sampling must be one of multinomial, gumbel; got 'x'"),
        ({"layout": "x"}, "layout must be one of stream, segments, packed; got 'x'"),
        ({"held_out": 0}, r"held_out must be in \(0, 1\), got 0"),
        ({"mask_fraction": 1.5}, r"mask_fraction must be in \(0, 1\), got 1.5"),
        ({"rtd_weight": -1}, "rtd_weight must not be negative, got -1"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"max_ngram": 0}, "max_ngram must be at least 1, got 0"),
        ({"mask_replacement": True, "max_ngram": 2}, "mask_replacement must be false with max_ng"),
        ({"generator_steps": 1000}, r"generator_steps must be in \(0, steps = 1000\), got 1000"),
        ({"random_token_fraction": 0.1}, "must not be negative, nor above 1 together; got 1.0 and"),
        ({"generator_max_grad_norm": 0}, "generator_max_grad_norm must be positive, got 0"),
        (
            {"discriminator": {"hidden_sise": 64}},
            "unknown config key 'discriminator.hidden_sise'; did you mean "
            "'discriminator.hidden_size'",
        ),
        ({"generator": {"qqqqq": 1}}, "unknown config key 'generator.qqqqq'$"),
        ({"discriminator": {"extra": {}}}, "unknown config key 'discriminator.extra'"),
        ({"generator": {"hidden_size": "wide"}}, "generator.hidden_size must be int, got 'wide'"),
        ({"discriminator": 7}, "discriminator must be dict, got 7"),
    ],
)
def test_setting_errors(values, message):
    with pytest.raises(ValueError, match=message):
        build(PretrainSettings, values)


@pytest.mark.parametrize("part", ["discriminator", "generator"])
@pytest.mark.parametrize("positions", ["position_biased_input", "emd"])
def test_sequence_longer_than_positions(part, positions):
    short = {positions: True, "max_position_embeddings": 64}
    settings = build(PretrainSettings, {part: short, "sequence_length": 65})
    message = f"at most {part}.max_position_embeddings = 64, got 65"
    with pytest.raises(ValueError, match=message):
        settings.configs(100, 0)
