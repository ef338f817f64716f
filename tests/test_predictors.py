"""Predictors: what every head says of a row, and what it asks of one."""

import pytest
import tiny
import torch
import transformers
from predicted import LABELS, TAGS, read, save, texts, write

from fastdeberta.finetuning import predictors
from fastdeberta.finetuning.predict import predict
from fastdeberta.finetuning.predictors import load
from fastdeberta.models import Model


def of(result, *names):
    return {name: result[name] for name in names}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_classes_are_those_of_transformers_one_text_at_a_time(family, tmp_path):
    save(tmp_path, family=family)
    rows = texts(30)
    for row in rows[::3]:
        row["pair"] = rows[1]["text"][:30]
    predict(load(tmp_path), write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    results = read(tmp_path / "out.jsonl")
    assert [result["line"] for result in results] == list(range(1, 31))
    for row, result in zip(rows, results, strict=True):
        encoding = tiny.tokenizer().encode(row["text"], row.get("pair"))
        cut = len(encoding.ids) > 48
        assert result.get("truncated", False) == cut
        if cut:
            continue
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if family == "electra":
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)[0]
        assert list(result["scores"]) == ["forest", "sea", "ça"]
        torch.testing.assert_close(
            torch.tensor(list(result["scores"].values())), expected, rtol=1e-4, atol=1e-5
        )
        assert result["label"] == LABELS[int(expected.argmax())]
        assert result["score"] == max(result["scores"].values())
    assert len({result["score"] for result in results}) > 20
    assert 0 < sum("truncated" in result for result in results) < 30


def test_regression_and_several_labels_at_once(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    example = [{"text": "the small deer"}]
    source = write(tmp_path / "in.jsonl", example)
    for directory, labels, kind in (
        (one, {0: "LABEL_0"}, "regression"),
        (many, LABELS, "multi_label_classification"),
    ):
        save(directory, id2label=labels, problem_type=kind)
        predict(load(directory), source, directory / "out.jsonl")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
        with torch.no_grad():
            ids = tiny.tokenizer().encode(example[0]["text"]).ids
            logits = model(torch.tensor([ids])).logits[0]
        (result,) = read(directory / "out.jsonl")
        if directory == one:
            assert list(result) == ["line", "score"]
            assert result["score"] == pytest.approx(logits.item(), abs=1e-4)
        else:
            scores = dict(zip(LABELS.values(), logits.sigmoid().tolist(), strict=True))
            assert result["scores"] == pytest.approx(scores, abs=1e-5)
            assert result["labels"] == [name for name, x in scores.items() if x >= 0.5]


def test_tags_of_words_and_of_texts(tmp_path):
    save(tmp_path, "token")
    text = "the small deer, oder  Bär"
    words = ["the", "small", "deer", ",", "oder", "Bär"]
    rows = [{"words": words}, {"text": text}, {"words": []}, {"words": ["deer"] * 99}, {"text": ""}]
    rows.append({"words": ["the", "", "small", "\u200b"]})
    predict(load(tmp_path), write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    by_words, by_text, empty, long, nothing, gaps = read(tmp_path / "out.jsonl")
    assert of(by_text, "tags", "scores") == of(by_words, "tags", "scores")
    assert len(by_words["tags"]) == 6 and set(by_words["tags"]) <= set(TAGS.values())
    assert by_text["words"] == [text[start:end] for start, end in by_text["offsets"]] == words
    assert empty["tags"] == empty["scores"] == nothing["tags"] == []
    assert long["truncated"] and len(long["tags"]) == len(long["scores"]) == 99
    assert long["tags"][0] is not None and long["tags"][-1] is None
    assert len(gaps["tags"]) == 4 and gaps["tags"][1] is None and "truncated" not in gaps
    # Against transformers: the label of each word's first token.
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    ids = tiny.tokenizer().encode(" ".join(words))
    first = [
        next(i for i, span in enumerate(ids.offsets) if span[1] > start)
        for start in [0, 4, 10, 15, 17, 22]
    ]
    with torch.no_grad():
        expected = model(torch.tensor([ids.ids])).logits[0].softmax(-1)[first].max(-1)
    assert by_words["tags"] == [TAGS[i] for i in expected.indices.tolist()]
    assert by_words["scores"] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_choices_of_any_number(tmp_path):
    save(tmp_path, "choice")
    rows = [
        {"text": "the deer", "options": ["walks", "dives in the sea", "hides"]},
        {"text": "the crab", "choices": ["swims", "grazes by the oak"]},
        {"text": "alone", "options": ["one"]},
    ]
    predict(load(tmp_path), write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    model = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path).eval()
    for row, result in zip(rows, read(tmp_path / "out.jsonl"), strict=True):
        encode = tiny.tokenizer().encode
        options = row.get("options") or row["choices"]
        encoded = [torch.tensor(encode(row["text"], option).ids) for option in options]
        with torch.no_grad():
            logits = torch.cat([model(ids[None, None]).logits[0] for ids in encoded])
        assert result["scores"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert result["label"] == int(logits.argmax())
        assert result["score"] == result["scores"][result["label"]]


def test_answers_in_texts_of_any_length(tmp_path):
    """Against every span of the whole text in one window, by transformers' model."""
    save(tmp_path, "span", max_position_embeddings=256)
    text = tiny.labelled(1)[0][0] + " été"
    rows = [
        {"question": "who hides?", "text": text, "id": "q1"},
        {"question": "who?", "context": ""},
        {"question": "who swims? " * 9, "text": (text + " ") * 4},
    ]
    predictor = load(tmp_path)
    predict(predictor, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    short, empty, long = read(tmp_path / "out.jsonl")
    assert short["id"] == "q1" and short["answer"] == text[short["start"] : short["end"]] != ""
    assert of(empty, "answer", "start", "end", "score") == {
        "answer": "",
        "start": 0,
        "end": 0,
        "score": 0.0,
    }
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    encoding = tiny.tokenizer().encode(rows[0]["question"], text)
    inside = [i for i, side in enumerate(encoding.sequence_ids) if side == 1]
    with torch.no_grad():
        logits = model(torch.tensor([encoding.ids]))
    start, end = logits.start_logits[0], logits.end_logits[0]
    pairs = [(i, j) for i in inside for j in inside if i <= j < i + 30]
    i, j = max(pairs, key=lambda pair: float(start[pair[0]] + end[pair[1]]))
    assert text[encoding.offsets[i][0] : encoding.offsets[j][1]].strip() == short["answer"]
    none = start[0] + end[0] - start[i] - end[j]
    assert short["no_answer"] == pytest.approx(none.item(), abs=1e-3)
    for more, answer in ((0.1, short["answer"]), (-0.1, "")):
        predictor.model.config.extra["no_answer_threshold"] = short["no_answer"] + more
        (judged,) = predictor.predict([predictor.read(rows[0])])
        assert judged["answer"] == answer and judged["no_answer"] == short["no_answer"]
    # Windows reach the end of a long text.
    narrow = load(tmp_path, max_length=40)
    (result,) = narrow.predict([narrow.read(rows[2])])
    assert result["answer"] == rows[2]["text"][result["start"] : result["end"]] != ""
    assert "truncated" not in result and "truncated" not in long


def test_bfloat16_gives_nearly_the_same(checkpoint, tmp_path):
    source = write(tmp_path / "in.jsonl", texts(20))
    scores = []
    for precision in ("fp32", "bf16"):
        predict(load(checkpoint, precision=precision), source, tmp_path / precision)
        scores.append(
            torch.tensor([list(r["scores"].values()) for r in read(tmp_path / precision)])
        )
    difference = (scores[0] - scores[1]).abs().max()
    assert 1e-5 < difference < 0.2


# What a row must have, and a batch may


@pytest.mark.parametrize(
    ("head", "row", "reason"),
    [
        ("token", {"words": "the deer"}, "'words' must be a list of strings"),
        ("token", {"words": ["a", 1]}, "'words' must be a list of strings"),
        ("token", {"x": 1}, "no 'text' or 'words'; it has x"),
        ("choice", {"text": "a", "options": []}, "'options' must be a list of strings, at least"),
        ("choice", {"text": "a", "options": "b"}, "'options' must be a list of strings, at least"),
        ("span", {"text": "a"}, "no 'question'; it has text"),
        ("span", {"question": "a"}, "no 'text' or 'context'; it has question"),
        ("choice", {"text": "a"}, "no 'options' or 'choices'; it has text"),
    ],
)
def test_what_other_heads_need(head, row, reason, tmp_path):
    with pytest.raises(ValueError) as caught:
        load(save(tmp_path, head)).read(row)
    assert str(caught.value).startswith(reason)


def test_columns_by_other_names(checkpoint, tmp_path):
    rows = [{"a": "the deer", "b": "hides", "text": "no"}]
    source = write(tmp_path / "in", rows)
    predict(load(checkpoint, text="a", beside="b"), source, tmp_path / "out")
    renamed = write(tmp_path / "in2", [{"text": "the deer", "text_pair": "hides"}])
    predict(load(checkpoint), renamed, tmp_path / "out2")
    assert read(tmp_path / "out") == read(tmp_path / "out2")
    with pytest.raises(ValueError, match="no 'c'; it has a, b, text"):
        predict(load(checkpoint, text="a", beside="c"), source, tmp_path / "out3")


def test_a_model_that_gives_nan(predictor, tmp_path):
    with torch.no_grad():
        predictor.model.head.classifier.bias[0] = torch.nan
    source = write(tmp_path / "in", texts(1))
    with pytest.raises(ValueError, match="line 1: the model gives NaN"):
        predict(predictor, source, tmp_path / "out")


def test_more_positions_than_the_model_has(tmp_path):
    save(tmp_path, family="electra")
    with pytest.raises(ValueError, match="max_position_embeddings = 48, got 49"):
        load(tmp_path, max_length=49)


def test_a_batch_holds_at_most_so_many_tokens(checkpoint, monkeypatch):
    predictor = load(checkpoint, tokens=100, device="cpu")
    sizes = []
    forward = Model.forward

    def recorded(self, input_ids, *args, **kwargs):
        sizes.append((len(input_ids), len(kwargs["cu_seqlens"]) - 1))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", recorded)
    monkeypatch.setattr(predictors, "_ROUND", 1)
    predictor.predict([predictor.read(row) for row in texts(50)])
    assert all(size <= 100 for size, _ in sizes) and sum(count for _, count in sizes) == 50
    assert max(count for _, count in sizes) > 1
    load(checkpoint, tokens=1, device="cpu").predict([predictor.read(texts(1)[0])])
