"""Replaced token detection: corruption, text, the pair, its losses and its scores."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastdeberta import tokenizer as tokenizers
from fastdeberta.models import Model, from_pretrained
from fastdeberta.pretraining import pair as pair_module
from fastdeberta.pretraining import text
from fastdeberta.pretraining.corruption import choose_positions, sample, substitute
from fastdeberta.pretraining.pair import DeltaEmbedding, Pair
from fastdeberta.pretraining.rtd import (
    Corpus,
    ReplacedTokenDetection,
    baselines,
    load_corpus,
    pretrain,
    rtd_accuracies,
)
from fastdeberta.pretraining.settings import PretrainSettings
from fastdeberta.training.settings import build

PAD, CLS, SEP, UNK, MASK = range(5)

# Corruption


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.25, 0.9])
def test_choose_positions(fraction):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 1, 2, 3, 7, 20, 63, 64])
    maskable = torch.rand(8, 64, generator=generator).argsort(1) < lengths[:, None]
    ids = tiny.token_ids(8, 64)
    masked = choose_positions(ids, maskable, fraction)
    places = max(1, round(64 * fraction))
    assert masked.positions.shape == masked.chosen.shape == masked.original.shape == (8, places)
    assert torch.equal(masked.original, ids.gather(1, masked.positions))
    for row, length in enumerate(lengths.tolist()):
        chosen = masked.positions[row][masked.chosen[row]].tolist()
        assert len(chosen) == min(length, max(1, round(length * fraction)))
        assert len(set(chosen)) == len(chosen), "without replacement"
        assert maskable[row, chosen].all()


def test_positions_are_chosen_evenly():
    maskable = torch.ones(4000, 10, dtype=torch.bool)
    maskable[:, 3] = False
    masked = choose_positions(torch.zeros(4000, 10, dtype=torch.long), maskable, 0.3)
    counts = masked.positions[masked.chosen].bincount(minlength=10)
    assert counts.sum() == 4000 * 3 and counts[3] == 0
    expected = 4000 * 3 / 9  # Of a fair draw, 8 degrees of freedom: above 35 once in 30,000.
    assert ((counts - expected).square() / expected)[maskable[0]].sum() < 35


def test_substitute():
    ids = tiny.token_ids(3, 20)
    before = ids.clone()
    masked = choose_positions(ids, torch.arange(20) < torch.tensor([[20], [5], [0]]), 0.3)
    assert masked.chosen.sum(1).tolist() == [6, 2, 0]
    for tokens in (MASK, torch.full_like(masked.positions, MASK)):
        new = substitute(ids, masked, tokens)
        for row in range(3):
            places = masked.positions[row][masked.chosen[row]]
            expected = ids[row].clone()
            expected[places] = MASK
            assert torch.equal(new[row], expected)
    assert torch.equal(ids, before)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_distribution(temperature):
    logits = torch.tensor([2.0, -1.0, 0.0, -torch.inf, 1.0, -2.0, 0.5, -torch.inf, -3.0])
    draws = 40_000
    counts = sample(logits.expand(draws, -1), temperature).bincount(minlength=9)
    expected = draws * (logits / temperature).softmax(-1)
    possible = expected > 0
    assert not counts[~possible].any()
    # 6 degrees of freedom: above 30 once in 25,000.
    assert ((counts - expected).square() / expected)[possible].sum() < 30


def test_sample_forms():
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16).requires_grad_()
    tokens = sample(logits)
    assert tokens.shape == (2, 3) and tokens.dtype == torch.int64 and not tokens.requires_grad
    torch.manual_seed(5)
    first = sample(logits)
    torch.manual_seed(5)
    assert torch.equal(sample(logits), first)
    certain = torch.full((100, 7), -torch.inf).index_fill_(1, torch.tensor(6), 0.0)
    assert (sample(certain) == 6).all()


# Text


@pytest.mark.parametrize("length", [4, 5, 8, 33, 5000])
def test_pack(length):
    tokenizer, documents = tiny.tokenizer(), tiny.documents(30)
    rows = text.pack(tokenizer, documents, length)
    assert rows.dtype == torch.int64 and rows.size(1) == length
    assert (rows[:, 0] == CLS).all()
    assert (rows[:-1, -1] == SEP).all() and (rows[:-1] != PAD).all()
    used = int((rows[-1] != PAD).sum())
    assert rows[-1, used - 1] == SEP and (rows[-1, used:] == PAD).all()
    stream = [*rows[:-1, 1:-1].flatten().tolist(), *rows[-1, 1 : used - 1].tolist()]
    expected = []
    for document in documents:
        expected += [*tokenizer.encode(document, add_special_tokens=False).ids, SEP]
    assert stream == expected[:-1]
    assert used > 2, "no row without text"


def test_pack_without_padding():
    tokenizer = tiny.tokenizer()
    count = len(tokenizer.encode("the old crab", add_special_tokens=False).ids)
    rows = text.pack(tokenizer, ["the old crab"] * 2, count + 2 + count + 1)
    assert rows.shape == (1, 2 * count + 3) and (rows != PAD).all()
    assert rows[0, count + 1] == SEP and rows[0, -1] == SEP


def test_pack_needs_room():
    with pytest.raises(ValueError, match="sequence_length must be at least 4, got 3"):
        text.pack(tiny.tokenizer(), ["text"], 3)


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


def test_read_documents(tmp_path):
    (tmp_path / "b.txt").write_bytes("one\ntwo \r\n\n \n\nthr\u00e9e\n".encode("utf-8-sig"))
    (tmp_path / "a.jsonl").write_text('{"text": "zero", "x": 1}\n\n{"text": " "}\n')
    (tmp_path / "notes.md").write_text("not a text")
    assert text.read_documents(tmp_path / "b.txt") == ["one two", "thr\u00e9e"]
    assert text.read_documents(tmp_path) == ["zero", "one two", "thr\u00e9e"]
    assert len(text.read_documents("wiki-leads")) == 10_033


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data: no text in .*text.jsonl"),
        (b'{"text": "a"}\n{"txt": "b"}', 'line 2: expected a JSON object with a "text"'),
        (b"\n[1]", 'line 2: expected a JSON object with a "text"'),
        (b"{", 'line 1: expected a JSON object with a "text"'),
        (b'{"text": "a"}\n"\xff"', "text.jsonl is not UTF-8: line 2, byte 2"),
    ],
)
def test_unreadable_documents(content, message, tmp_path):
    (tmp_path / "text.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.read_documents(tmp_path / "text.jsonl")


def test_missing_documents(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*missing"):
        text.read_documents(tmp_path / "missing")
    with pytest.raises(ValueError, match="data: no text in "):
        text.read_documents(tmp_path)


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_split(count, held_out, seed):
    documents = [str(i) for i in range(count)]
    rest, kept = text.split(documents, held_out, seed)
    assert sorted(rest + kept) == sorted(documents)
    assert rest and kept
    assert len(kept) == min(max(1, round(count * held_out)), count - 1)
    assert text.split(documents, held_out, seed) == (rest, kept)


# The pair

SPECIALS = {"mask_id": MASK, "special_ids": [PAD, CLS, SEP, MASK]}


def pair_of(tie="embeddings", family="deberta-v2", changes=(), generator=(), **options):
    discriminator = tiny.config(family, **dict(changes))
    pair = Pair(
        replace(discriminator, **dict(generator)), discriminator, tie, **SPECIALS, **options
    )
    return tiny.randomize(pair)


def batch(length=40):
    """Rows of 40 tokens (30 of the second) between [CLS] and [SEP], and their mask."""
    ids = tiny.token_ids(3, length)
    ids[:, 0], ids[:, -1] = CLS, SEP
    ids[1, 30:] = PAD
    return ids, ids != PAD


def inputs_of(model, run):
    """What `model` was called with while `run` ran."""
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args))
    result = run()
    hook.remove()
    assert len(seen) == 1
    return seen[0], result


def test_steps_of_the_pair():
    pair = pair_of(mask_fraction=0.3)
    ids, mask = batch()
    (inputs, given_mask, *_), output = inputs_of(pair.generator.backbone, lambda: pair(ids, mask))
    places, chosen = output.masked.positions, output.masked.chosen
    at_chosen = torch.zeros_like(mask)
    for row in range(3):
        at_chosen[row, places[row][chosen[row]]] = True
    maskable = mask & (ids != CLS) & (ids != SEP)
    assert not (at_chosen & ~maskable).any()
    assert at_chosen.sum(1).tolist() == [round(0.3 * n) for n in maskable.sum(1).tolist()]
    assert torch.equal(inputs, ids.masked_fill(at_chosen, MASK)), "[MASK] at every chosen position"
    assert torch.equal(given_mask, mask)
    hidden = pair.generator.backbone(inputs, mask)[-1]
    head, table = pair.generator.head, pair.generator.backbone.embeddings.word_embeddings.weight
    logits = head(hidden, table).gather(1, places[..., None].expand(-1, -1, table.size(0)))
    torch.testing.assert_close(output.mlm_logits, logits)
    corrupted = ids.clone().scatter_(
        1, places, output.samples.where(chosen, output.masked.original)
    )
    torch.testing.assert_close(output.rtd_logits, pair.discriminator(corrupted, mask).logits)
    assert torch.equal(output.replaced, corrupted != ids) and output.replaced.any()
    assert torch.equal(output.scored, mask)


def test_a_sample_equal_to_the_original_is_real(monkeypatch):
    ids, mask = batch()
    original = {}

    def half(logits, temperature):
        """The original token at every other place, another one at the rest."""
        tokens = original["tokens"].clone()
        tokens[:, 1::2] = (tokens[:, 1::2] + 1).clamp(max=66) - 2 * (tokens[:, 1::2] == 66).long()
        return tokens

    def choose(*arguments):
        masked = choose_positions(*arguments)
        original["tokens"] = masked.original
        return masked

    monkeypatch.setattr(pair_module, "sample", half)
    monkeypatch.setattr(pair_module, "choose_positions", choose)
    output = pair_of()(ids, mask)
    expected = torch.zeros_like(mask)
    for row in range(3):
        expected[row, output.masked.positions[row, 1::2][output.masked.chosen[row, 1::2]]] = True
    assert expected.any() and torch.equal(output.replaced, expected)


def test_the_vocabulary_product_runs_on_chosen_positions_only():
    pair = pair_of(mask_fraction=0.2)
    ids, mask = batch()
    (hidden, table), output = inputs_of(pair.generator.head, lambda: pair(ids, mask))
    assert hidden.shape == (3, 8, 32), "40 tokens * 0.2 places a row"
    assert output.mlm_logits.shape == (3, 8, 67)
    assert table is pair.generator.backbone.embeddings.word_embeddings.weight


def test_tokens_that_the_mask_excludes_are_never_chosen():
    """Also when they are ordinary tokens."""
    pair = pair_of(mask_fraction=0.9)
    ids = tiny.token_ids(2, 20)
    mask = torch.arange(20) < torch.tensor([[5], [20]])
    masked = pair(ids, mask).masked
    assert masked.chosen.sum(1).tolist() == [round(0.9 * 5), 18]
    assert (masked.positions[0][masked.chosen[0]] < 5).all()


def test_losses():
    """Means by hand over chosen and over real tokens, of a batch with spare places and padding."""
    pair = pair_of(mask_fraction=0.3)
    output = pair(*batch())
    losses = pair.losses(output)
    mlm, rtd = [], []
    log_probs = output.mlm_logits.double().log_softmax(-1)
    for row in range(3):
        for place, chosen in enumerate(output.masked.chosen[row].tolist()):
            if chosen:
                mlm.append(-log_probs[row, place, output.masked.original[row, place]])
        for t in range(30 if row == 1 else 40):
            p = output.rtd_logits[row, t].double().sigmoid()
            rtd.append(-(p if output.replaced[row, t] else 1 - p).log())
    assert not output.masked.chosen.all() and not output.scored.all()
    assert (losses.mlm_count, losses.rtd_count) == (len(mlm), len(rtd)) == (11 + 9 + 11, 110)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(losses.mlm_sum.double(), sum(mlm), **close)
    torch.testing.assert_close(losses.rtd_sum.double(), sum(rtd), **close)
    expected = sum(mlm) / len(mlm) + 7 * sum(rtd) / len(rtd)
    torch.testing.assert_close(losses.total(7.0).double(), expected, **close)


def test_the_mask_is_optional():
    pair = pair_of()
    ids = tiny.token_ids(2, 20)
    outputs = []
    for mask in (None, torch.ones(2, 20, dtype=torch.long)):
        torch.manual_seed(0)
        outputs.append(pair(ids, mask))
    assert outputs[0].scored.all()
    torch.testing.assert_close(pair.losses(outputs[0]), pair.losses(outputs[1]))


def gradients(pair, part):
    """Gradients by name of one of the two losses alone; those that are not reached are left out."""
    losses = pair.losses(pair(*batch()))
    pair.zero_grad()
    (losses.mlm_sum if part == "generator" else losses.rtd_sum).backward()
    return {n: p.grad for n, p in pair.named_parameters() if p.grad is not None and p.grad.any()}


def test_tie_none():
    pair = pair_of("none", generator={"hidden_size": 16, "embedding_size": 16})
    generator = {id(p) for p in pair.generator.parameters()}
    assert not generator & {id(p) for p in pair.discriminator.parameters()}
    assert all(name.startswith("generator.") for name in gradients(pair, "generator"))
    assert all(name.startswith("discriminator.") for name in gradients(pair, "discriminator"))


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_tie_embeddings(family):
    pair = pair_of("embeddings", family, {"type_vocab_size": 2, "position_biased_input": True})
    ours, theirs = pair.generator.backbone.embeddings, pair.discriminator.backbone.embeddings
    for name in ("word", "position", "token_type"):
        assert getattr(ours, f"{name}_embeddings") is getattr(theirs, f"{name}_embeddings")
    shared = {id(p) for p in pair.generator.parameters()} & {
        id(p) for p in pair.discriminator.parameters()
    }
    assert len(shared) == 3
    for part in ("generator", "discriminator"):
        assert "generator.backbone.embeddings.word_embeddings.weight" in gradients(pair, part)


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_tie_gdes(family):
    pair = pair_of("gdes", family, {"position_biased_input": True})
    ours, theirs = pair.generator.backbone.embeddings, pair.discriminator.backbone.embeddings
    tables = ["word_embeddings", "position_embeddings"]
    grads = {part: gradients(pair, part) for part in ("generator", "discriminator")}
    for name in tables:
        assert isinstance(getattr(theirs, name), DeltaEmbedding)
        assert f"discriminator.backbone.embeddings.{name}._weight" in grads["discriminator"]
        assert f"generator.backbone.embeddings.{name}.weight" in grads["generator"]
    assert not [n for n in grads["discriminator"] if n.startswith("generator.")]
    assert not [n for n in grads["generator"] if n.startswith("discriminator.")]
    with torch.no_grad():
        ours.word_embeddings.weight += 1  # The discriminator follows its generator's table.
    expected = ours.word_embeddings.weight + theirs.word_embeddings._weight
    torch.testing.assert_close(theirs.word_embeddings.weight, expected)
    ids = tiny.token_ids(2, 3)
    torch.testing.assert_close(theirs.word_embeddings(ids), expected[ids])


def test_gdes_starts_at_the_generators_table():
    pair = Pair(tiny.config(), tiny.config(), "gdes", **SPECIALS)
    delta = pair.discriminator.backbone.embeddings.word_embeddings
    assert not delta._weight.any() and delta.num_embeddings == 67
    assert torch.equal(delta.weight, pair.generator.backbone.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("tie", ["none", "embeddings", "gdes"])
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_exported_discriminator(tie, family, tmp_path):
    pair = pair_of(tie, family, {"position_biased_input": True})
    exported = pair.export_discriminator().eval()
    assert isinstance(exported, Model)
    assert all(isinstance(m, nn.Embedding) for m in exported.modules() if hasattr(m, "padding_idx"))
    ids, mask = batch()
    expected = pair.discriminator(ids, mask).logits
    assert torch.equal(exported(ids, mask).logits, expected)
    exported.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path, "rtd").eval()(ids, mask).logits, expected)
    own = {p.data_ptr() for p in pair.parameters()}
    assert not own & {p.data_ptr() for p in exported.parameters()}, "a copy, not a view"


@pytest.mark.parametrize("tie", ["embeddings", "gdes"])
@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
def test_narrower_generator(tie, family):
    size = tiny.config(family).embedding_size
    narrow = {"hidden_size": 16, "intermediate_size": 32, "embedding_size": size}
    pair = pair_of(tie, family, generator=narrow | {"num_hidden_layers": 1})
    assert pair.generator.backbone.embeddings.embed_proj.weight.shape == (16, size)
    output = pair(*batch())
    assert output.mlm_logits.size(-1) == 67
    reached = gradients(pair, "generator")
    assert "generator.backbone.embeddings.embed_proj.weight" in reached
    assert not [n for n in reached if n.startswith("discriminator.")]


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
        pair_of(tie, changes={"position_biased_input": True}, generator=generator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": "all"}, "tie must be one of none, embeddings, gdes; got 'all'"),
        ({"mask_fraction": 0}, r"mask_fraction must be in \(0, 1\), got 0"),
        ({"mask_fraction": 1.0}, r"mask_fraction must be in \(0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_pair_errors(options, message):
    with pytest.raises(ValueError, match=message):
        pair_of(**options)


# Scores


def test_baselines():
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 10)
    train = torch.tensor([[CLS, 5, 5, 5, 6, SEP], [CLS, 6, 7, 5, SEP, PAD]])
    held_out = torch.tensor([[CLS, 5, 6, 6, 8, SEP]])
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
    return build(PretrainSettings, values | changes)


def task_of(tmp_path, **changes):
    settings = settings_of(tmp_path, **changes)
    return ReplacedTokenDetection(settings, load_corpus(settings))


@pytest.mark.parametrize("tie", ["none", "embeddings", "gdes"])
def test_parameter_groups(tie, tmp_path):
    task = task_of(tmp_path, tie=tie, generator_learning_rate=0.5)
    groups = task.parameter_groups()
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted({id(p) for p in task.pair.parameters()}), "each once"
    table = task.pair.generator.backbone.embeddings.word_embeddings.weight
    generator = {id(p) for p in task.pair.generator.parameters()}
    for group in groups:
        own = group["network"] == "generator"
        assert group["peak_lr"] == (0.5 if own else 0.003)
        assert all((id(p) in generator) == own for p in group["params"])
    assert id(table) in {id(p) for p in groups[0]["params"]}


def test_batches(tmp_path):
    task = task_of(tmp_path)
    rows = task.corpus.train
    epoch = len(rows) // 8
    seen = torch.cat([task.batch(step).input_ids for step in range(epoch)])
    assert len(seen) == epoch * 8 and len({tuple(r) for r in seen.tolist()}) > 0.9 * len(seen)
    assert all((row == rows).all(1).any() for row in seen[:20])
    whole, padded = task._batch(rows[:2]), task._batch(rows[-1:])
    assert whole.attention_mask is None and task.tokens(whole) == 48
    assert torch.equal(padded.attention_mask, rows[-1:] != PAD)
    assert task.tokens(padded) == (rows[-1] != PAD).sum() < 24


@torch.no_grad()
def test_scores_of_an_untrained_pair(tmp_path):
    task = task_of(tmp_path)
    scores = task.evaluate(batch_size=5)
    size = task.corpus.tokenizer.get_vocab_size()
    assert 0 <= scores["mlm_accuracy"] < 0.3
    assert scores["mlm_loss"] == pytest.approx(math.log(size), abs=0.5)
    assert 0.3 < scores["rtd_auc"] < 0.7
    assert 0.05 < scores["replaced_fraction"] < 0.16


def test_a_short_run_learns_and_leaves_loadable_models(tmp_path):
    with torch.no_grad():
        before = task_of(tmp_path).evaluate()
    result = pretrain(settings_of(tmp_path, steps=80))
    assert result["mlm_loss"] < before["mlm_loss"] - 0.5
    assert result["step"] == 80 and result["tokens"] > 80 * 8 * 20
    assert result["parameters"]["generator"]["total"] > 0
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert written["baseline"] == result["baseline"] and 0 < result["baseline"]["unigram"] < 1
    for head, name in (("mlm", "generator"), ("rtd", "discriminator")):
        directory = tmp_path / "run" / name
        model = from_pretrained(directory, head)
        assert model.config.vocab_size == tokenizers.load(directory).get_vocab_size()


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tie": "all"}, "tie must be one of none, embeddings, gdes; got 'all'"),
        ({"held_out": 0}, r"held_out must be in \(0, 1\), got 0"),
        ({"mask_fraction": 1.5}, r"mask_fraction must be in \(0, 1\), got 1.5"),
        ({"rtd_weight": -1}, "rtd_weight must not be negative, got -1"),
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
def test_sequence_longer_than_positions(part):
    short = {"position_biased_input": True, "max_position_embeddings": 64}
    settings = build(PretrainSettings, {part: short, "sequence_length": 65})
    message = f"at most {part}.max_position_embeddings = 64, got 65"
    with pytest.raises(ValueError, match=message):
        settings.configs(100, 0)
