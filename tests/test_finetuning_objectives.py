"""Objectives of fine-tuning: sums that add up, packed as padded, and heads that learn."""

import random

import pytest
import tiny
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, softplus

from fastdeberta.finetuning.decoding import entities, predict
from fastdeberta.finetuning.examples import (
    Answer,
    ChoiceExample,
    EntityExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from fastdeberta.finetuning.finetuning import Finetuning, Split
from fastdeberta.finetuning.labels import encode
from fastdeberta.finetuning.objectives import objective_for
from fastdeberta.finetuning.settings import FinetuneSettings
from fastdeberta.finetuning.tasks import TASKS
from fastdeberta.models import Model
from fastdeberta.training.draws import Draws
from fastdeberta.training.trainer import Trainer

PLACES = ("reef", "tide", "shell", "coast", "wave")
ANIMALS = ("crab", "whale", "seal", "gull", "squid")
LAND = ("oak", "birch", "moss", "fern", "path")
KINDS = ("sequence", "pair", "regression", "choice", "token", "span", "beam", "entity")
TASK = {
    "sequence": "classification",
    "pair": "classification",
    "regression": "stsb",
    "choice": "choice",
    "token": "tagging",
    "span": "squad2",
    "beam": "squad2",
    "entity": "record",
}
NAMES = {
    "sequence": ["forest", "sea"],
    "pair": ["forest", "sea"],
    "token": ["animal", "other", "place"],
}


def made(kind, count, seed):
    """Examples whose words give the right answer away."""
    draw = random.Random(seed)
    examples = []
    for i, (text, topic) in enumerate(tiny.labelled(count, seed)):
        animal, other = draw.sample(ANIMALS, 2)
        place, elsewhere = draw.sample(PLACES, 2)
        sea = f"The {animal} swims near the {place}."
        name = str(i)
        if kind in ("sequence", "pair"):
            pair = text if kind == "pair" else None
            examples.append(TextExample(name, "The old owl." if pair else text, pair, topic))
        elif kind == "regression":
            examples.append(TextExample(name, text, None, 3.0 if topic == "sea" else 1.0))
        elif kind == "choice":
            options = [f"the {draw.choice(LAND)} and the owl" for _ in range(2 + i % 3)]
            right = draw.randrange(len(options))
            options[right] = f"the {place} and the owl"
            examples.append(ChoiceExample(name, "The old", tuple(options), right))
        elif kind == "token":
            words = sea[:-1].split()
            tags = ["animal" if w == animal else "place" if w == place else "other" for w in words]
            examples.append(TaggedExample(name, tuple(words), tuple(tags)))
        elif kind in ("span", "beam"):
            answer = () if i % 4 == 0 else (Answer(animal, sea.index(animal)),)
            whole = sea if answer else "The owl sleeps near the oak."
            examples.append(SpanExample(name, "old", whole, answer))
        else:
            found = tuple((sea.index(w), sea.index(w) + len(w)) for w in (place, animal))
            examples.append(EntityExample(name, sea, "@placeholder", found, (animal,)))
    return examples


def model_of(kind, family="deberta-v2", **changes):
    torch.manual_seed(0)
    values = {"vocab_size": tiny.tokenizer().get_vocab_size(), "initializer_range": 0.1}
    values |= {"max_position_embeddings": 64, "span_beam_size": 4, "span_hidden_size": 24}
    values |= {"span_head": "beam"} if kind == "beam" else {}
    values |= {"cls_dropout": 0.0, "classifier_dropout": 0.0, "summary_last_dropout": 0.0}
    if kind in NAMES:
        values["id2label"] = dict(enumerate(NAMES[kind]))
    elif kind == "regression":
        values["id2label"] = {0: "LABEL_0"}
    return Model(tiny.config(family, **(values | changes)), TASKS[TASK[kind]].head)


def encoded(kind, examples, training, **changes):
    settings = FinetuneSettings(
        **({"max_length": 48, "max_query_length": 8, "stride": 8} | changes)
    )
    head = TASKS[TASK[kind]].head
    return encode(head, tiny.tokenizer(), examples, NAMES.get(kind, []), settings, training, "x")


@pytest.mark.parametrize("family", ["deberta-v2", "electra"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_the_heads_own_means(kind, family):
    """Packed and padded; and over micro-batches they add up."""
    model = tiny.randomize(model_of(kind, family))
    objective = objective_for(model)
    examples = made(kind, 6, 1)
    if kind == "choice":  # The head's own loss is of questions with equally many options.
        examples = [example for example in made(kind, 18, 1) if len(example.options) == 3]
    train = encoded(kind, examples, True, max_length=24)
    rows = list(range(min(6, len(train))))
    packed, padded = train.batch(rows), train.batch(rows, packed=False)
    loss, count = objective(packed)["loss"], objective.count(packed)
    torch.testing.assert_close(objective(padded)["loss"], loss, rtol=1e-5, atol=1e-5)
    assert objective.count(padded) == count > 0
    for batch in (packed, padded):
        more = dict(batch.targets)
        if kind == "token":
            labels = torch.full(batch.input_ids.shape, -100)
            labels.view(-1)[more.pop("places")] = more["labels"]
            more["labels"] = labels
        if kind in ("span", "beam"):
            more["answer_mask"] = batch.token_type_ids
        types, ids, mask = batch.token_type_ids, batch.input_ids, batch.attention_mask
        if kind == "choice" and mask is not None:
            types, ids, mask = (x.unflatten(0, (-1, 3)) for x in (types, ids, mask))
        packing = {"cu_seqlens": batch.cu_seqlens, "num_choices": 3}
        own = model(ids, mask, types, **packing, **more).loss
        torch.testing.assert_close(loss / count, own, rtol=1e-5, atol=1e-5)
    parts = [train.batch(part) for part in (rows[:2], rows[2:])]
    torch.testing.assert_close(sum(objective(b)["loss"] for b in parts), loss, rtol=1e-5, atol=1e-5)
    assert sum(map(objective.count, parts)) == count


def test_the_means_of_the_heads_do_not_add_up():
    """The control: with unequal micro-batches their mean is another number."""
    model = tiny.randomize(model_of("entity"))
    examples = made("entity", 4, 1)
    examples[0] = examples[0]._replace(entities=examples[0].entities[:1])
    train = encoded("entity", examples, True)

    def mean(rows):
        batch = train.batch(rows)
        objective = objective_for(model)
        return objective(batch)["loss"] / objective.count(batch)

    assert abs(mean([0, 1, 2, 3]) - (mean([0]) + mean([1, 2, 3])) / 2) > 1e-3


def test_losses_by_hand():
    choice = objective_for(tiny.randomize(model_of("choice")).eval())
    batch = encoded("choice", made("choice", 3, 0), True).batch([0, 2])
    assert batch.options == (2, 4)
    (logits,) = choice.outputs(batch)
    assert logits.shape == (2, 4) and (logits[0, 2:] < -1000).all()
    labels = batch.targets["labels"]
    expected = cross_entropy(logits[:1, :2], labels[:1]) + cross_entropy(logits[1:], labels[1:])
    torch.testing.assert_close(choice.losses(batch, (logits,))["loss"], expected)
    beam = objective_for(model_of("beam"))
    batch = encoded("beam", made("beam", 2, 0), True).batch([0, 1])
    start, end = torch.randn(2, 48), torch.randn(2, 48)
    none = torch.tensor([0.5, -1.0])
    starts, ends = batch.targets["start_positions"], batch.targets["end_positions"]
    assert starts.tolist()[0] == 0 < starts.tolist()[1]
    expected = cross_entropy(start, starts) + cross_entropy(end, ends)
    expected = expected + 0.5 * (softplus(torch.tensor(-0.5)) + softplus(torch.tensor(-1.0)))
    torch.testing.assert_close(beam.losses(batch, (start, end, none))["loss"], expected)
    entity = objective_for(model_of("entity"))
    examples = made("entity", 2, 0)
    examples[0] = examples[0]._replace(entities=examples[0].entities[:1])
    batch = encoded("entity", examples, True).batch([0, 1])
    logits = torch.tensor([[0.3, 99.0], [1.0, -1.0]])
    scored = torch.tensor([0.3, 1.0, -1.0])
    expected = binary_cross_entropy_with_logits(scored, torch.tensor([0.0, 0, 1]), reduction="sum")
    torch.testing.assert_close(entity.losses(batch, (logits,))["loss"], expected)
    assert entity.count(batch) == 3


def test_a_head_without_an_objective():
    with pytest.raises(ValueError, match="head must be one of sequence, choice, token, span, enti"):
        objective_for(Model(tiny.config(), "rtd"))


def finetuning(kind, settings, train=96, dev=32, model=None):
    held_out = made(kind, dev, 2)
    split = Split(held_out, encoded(kind, held_out, False))
    return Finetuning(
        TASKS[TASK[kind]],
        model or model_of(kind),
        settings,
        tiny.tokenizer(),
        encoded(kind, made(kind, train, 1), True),
        {"dev": split},
    )


def settings_of(output, **changes):
    values = {"output": str(output), "learning_rate": 3e-3, "steps": 60, "warmup_steps": 6}
    values |= {"batch_size": 16, "device": "cpu", "max_length": 48, "max_query_length": 8}
    return FinetuneSettings(**(values | {"log_every": 1} | changes))


SCORES = {
    "sequence": ("accuracy", 0.95),
    "pair": ("accuracy", 0.95),
    "regression": ("pearson", 0.9),
    "choice": ("accuracy", 0.95),
    "token": ("tag_accuracy", 0.98),
    "span": ("f1", 0.95),
    "beam": ("f1", 0.95),
    "entity": ("em", 0.95),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_learns(kind, tmp_path):
    run = finetuning(kind, settings_of(tmp_path, steps=120 if kind == "beam" else 60))
    name, least = SCORES[kind]
    before = run.evaluate()[name]
    result = Trainer(run, run.settings).run()
    assert result[name] >= least > before
    if kind in ("span", "beam"):
        assert result["best_f1"] == pytest.approx(result["f1"])
        assert {"no_answer_f1", "has_answer_f1"} <= result.keys()


def test_predictions_without_padding_are_those_with_it(tmp_path):
    for kind in KINDS:
        outputs = {}
        model = tiny.randomize(model_of(kind))
        for packed in (True, False):
            run = finetuning(kind, settings_of(tmp_path, packed=packed), 4, 9, model)
            run.settings.evaluation_tokens = 100 if packed else 1
            outputs[packed] = run.run(run.dev["dev"].features)
        for ours, theirs in zip(outputs[True], outputs[False], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=kind)


def test_words_beyond_the_length_are_counted(tmp_path):
    run = finetuning("token", settings_of(tmp_path), 4)
    examples = made("token", 3, 5)
    short = encoded("token", examples, False, max_length=5)
    outputs = [(torch.tensor([[0.0, 1, 0]]).repeat(len(x), 1),) for x in run.run(short) for x in x]
    args = (run.task, examples, short, outputs)
    found = predict(*args, NAMES["token"], run.settings)
    places = sum(len(short.words[i]) for i in range(3))
    assert found.missed == sum(len(e.words) for e in examples) - places > 0
    assert {tag for tags in found.values for tag in tags} == {"other"}
    assert [len(tags) for tags in found.values] == [len(e.words) for e in examples]
    found = predict(*args, ["O", "B-X", "I-X"], run.settings)
    assert [tags[-1] for tags in found.values] == ["O"] * 3 and found.values[0][0] == "B-X"


def test_a_question_without_entities():
    assert entities([EntityExample("", "a text", "x", ())], [(torch.empty(0),)]) == [""]


@pytest.mark.parametrize("kind", ["token", "beam"])
def test_accumulation_changes_nothing(kind, tmp_path):
    """Micro-batches of unequal counts: the same weights but for rounding."""
    weights = []
    for parts in (1, 3):
        output = tmp_path / f"{parts}"
        settings = settings_of(output, steps=4, accumulation=parts, batch_size=7, epsilon=1e-3)
        run = finetuning(kind, settings, 20, 4)
        Trainer(run, settings).run()
        weights.append({n: p.detach() for n, p in run.classifier.named_parameters()})
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.equal(weights[1][n], p) for n, p in model_of(kind).named_parameters())


def test_sift_is_one_of_the_losses(tmp_path):
    run = finetuning("sequence", settings_of(tmp_path, steps=3, sift=True), 16, 4)
    batch = run.batch(torch.arange(4), Draws(0, 0, 0, 4, 4))
    assert run.counts(batch).keys() == {"loss", "sift_loss", "sift_skipped"}
    assert run.weights(0) == {"loss": 1.0, "sift_loss": 5.0}
    plain = finetuning("sequence", settings_of(tmp_path), 16, 4)
    assert run.compute(batch) == 3 * plain.compute(batch)
    Trainer(run, run.settings).run()
