"""Readers: tests/data holds hand-written rows in each benchmark's own layout, with its oddities."""

import json
import shutil
from pathlib import Path

import pytest

from fastdeberta.finetuning.examples import (
    Answer,
    ChoiceExample,
    EntityExample,
    TaggedExample,
    TextExample,
)
from fastdeberta.finetuning.metrics import METRICS
from fastdeberta.finetuning.readers import conll, superglue
from fastdeberta.finetuning.settings import FinetuneSettings
from fastdeberta.finetuning.submissions import WRITERS
from fastdeberta.finetuning.tasks import TASKS, find_task
from fastdeberta.models.heads import HEADS
from fastdeberta.training.settings import build

DATA = Path(__file__).parent / "data"
FOLDERS = {
    "squad2": "squad",
    "upos": "ud",
    "wnli-choice": "glue",
    "wsc-choice": "superglue",
} | {name: name for name in ("squad", "race", "swag", "conll2003")}


def folder(name):
    return DATA / FOLDERS.get(name, TASKS[name].submission)


def read(name, split, root=DATA):
    return TASKS[name].read(root / folder(name).relative_to(DATA), split)


# The table


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_row_of_the_table_fits_the_rest(task):
    assert task.head in HEADS
    assert task.metrics and set(task.metrics) <= set(METRICS)
    assert task.submission is None or task.submission in WRITERS
    build(FinetuneSettings, dict(task.recipe))  # Unknown keys and bad values raise.


def test_electras_epochs():
    epochs = {name: task.recipe["epochs"] for name, task in TASKS.items()}
    assert [epochs[name] for name in ("rte", "stsb", "mnli", "cola", "squad")] == [10, 10, 3, 3, 2]


def test_find_task():
    assert find_task("cola") is TASKS["cola"]
    with pytest.raises(ValueError, match="unknown task 'mlni'; did you mean 'mnli'"):
        find_task("mlni")
    with pytest.raises(ValueError, match="Known are cola, .*task file"):
        find_task("?")


# Files as distributed: of every split the number of rows, the first row, and all labels

HULL, HULL2 = "A crane lifts the hull.", "The hull is being lifted."
E, N, C = "entailment", "neutral", "contradiction"
NLI = [E, N, E, C, E, C, N, C, N]
PAIRED = list("111010001")
ENTAILED = [E if label == "1" else "not_entailment" for label in PAIRED]
COLA = list("1110100001")
GULLS = "The gulls followed the trawler home."
LARCH = "Larch -- The larch is a conifer which sheds its needles in autumn."

TEXTS = [
    ("cola", "train", TextExample("0", GULLS), COLA),
    ("cola", "dev", TextExample("0", "\u6771\u4eac is where the \U0001f989 lives."), COLA[::-1]),
    ("cola", "test", TextExample("0", GULLS), [None] * 10),
    ("sst2", "train", TextExample("0", GULLS.lower() + " "), COLA),
    ("sst2", "dev", TextExample("0", GULLS.lower() + " "), COLA[:8]),
    ("sst2", "test", TextExample("0", GULLS.lower()), [None] * 10),
    ("mrpc", "train", TextExample("0", HULL, HULL2), PAIRED),
    ("mrpc", "dev", TextExample("0", HULL, HULL2), PAIRED),
    ("mrpc", "test", TextExample("0", HULL, HULL2), [None] * 9),
    ("stsb", "train", TextExample("0", HULL, HULL2), [5, 4.75, 3.8, 0, 2.4, 1.25, 0, 0.5, 3.6]),
    ("stsb", "dev", TextExample("0", HULL, HULL2), [5, 4.75, 3.8, 0, 2.4, 1.25, 0, 0.5, 3.6]),
    ("stsb", "test", TextExample("0", HULL, HULL2), [None] * 9),
    ("qqp", "dev", TextExample("100", HULL[:-1] + "?", HULL2[:-1] + "?"), PAIRED),
    ("qqp", "test", TextExample("0", HULL[:-1] + "?", HULL2[:-1] + "?"), [None] * 9),
    ("mnli", "train", TextExample("0", HULL, HULL2), NLI),
    ("mnli", "dev", TextExample("0", HULL, HULL2), NLI),
    (
        "mnli",
        "dev-mm",
        TextExample("8", "Two owls share one barn.", "A barn holds owls."),
        NLI[::-1],
    ),
    ("mnli", "test", TextExample("0", HULL, HULL2), [None] * 9),
    (
        "mnli",
        "test-mm",
        TextExample("8", "Two owls share one barn.", "A barn holds owls."),
        [None] * 9,
    ),
    ("mnli", "ax", TextExample("0", HULL, HULL2), [None] * 9),
    ("ax", "test", TextExample("0", HULL, HULL2), [None] * 9),
    ("qnli", "train", TextExample("0", HULL[:-1] + "?", HULL2), ENTAILED),
    ("qnli", "test", TextExample("0", HULL[:-1] + "?", HULL2), [None] * 9),
    ("rte", "train", TextExample("0", HULL, HULL2), ENTAILED),
    ("rte", "test", TextExample("0", HULL, HULL2), [None] * 9),
    (
        "wnli",
        "train",
        TextExample(
            "0",
            "The jar would not fit into the crate because it was too wide.",
            "The jar was too wide.",
        ),
        list("101001011"),
    ),
    (
        "boolq",
        "dev",
        TextExample("0", LARCH, "do larches keep their needles in winter"),
        ["false", "true", "true", "false", "true", "false", "true", "true"],
    ),
    (
        "cb",
        "dev",
        TextExample("0", 'B: A crane lifts the hull.\nA: Uh-huh. "Really"?', HULL2[:-1]),
        [E, C, N, E, C, N, E, C],
    ),
    ("superglue-rte", "dev", TextExample("0", HULL, HULL2), ENTAILED),
    ("superglue-rte", "ax-b", TextExample("0", HULL, HULL2), ENTAILED),
    ("superglue-rte", "ax-g", TextExample("0", HULL, HULL2), ENTAILED),
    (
        "wic",
        "dev",
        TextExample("0", "The *bank* was steep.", "She banked on the *bank*."),
        ["false", "true", "true", "false", "false", "true", "false", "true"],
    ),
    (
        "wsc",
        "dev",
        TextExample(
            "0",
            "Mark told Pete many lies about himself, which Pete put in his book. *He* should have "
            "been truthful.",
            "Mark",
        ),
        ["true", "false", "false", "true", "true", "false", "true", "false"],
    ),
]


@pytest.mark.parametrize(
    ("name", "split", "first", "labels"), TEXTS, ids=[f"{row[0]}-{row[1]}" for row in TEXTS]
)
@pytest.mark.parametrize("ends", ["LF", "CRLF"])
def test_texts(name, split, first, labels, ends, tmp_path):
    root = DATA
    if ends == "CRLF":
        root = tmp_path
        source = folder(name)
        shutil.copytree(source, root / source.name)
        for path in root.rglob("*.*"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    examples = read(name, split, root)
    assert [example.label for example in examples] == labels
    assert examples[0]._replace(label=None) == first
    assert len({example.id for example in examples}) == len(examples)


def test_quotes_and_foreign_letters_stay_as_they_are():
    texts = [example.text for example in read("cola", "train")]
    assert texts[1:3] == [
        '"Who left the gate open?" asked Ann.',
        'He measured the plank at 6" and sawed.',
    ]
    assert texts[4].startswith("Zo\u00eb's caf\u00e9 \u2014") and texts[6] == "NA"
    assert read("mrpc", "dev")[2].pair == 'It is 3 inches "long.'


def test_a_task_reads_from_its_own_folder_as_from_the_one_above():
    for name, own in (("cola", "CoLA"), ("mnli", "MNLI"), ("stsb", "STS-B")):
        assert TASKS[name].read(DATA / "glue" / own, "dev") == read(name, "dev")
    assert TASKS["mnli"].read(DATA / "glue" / "MNLI", "ax") == read("ax", "test")
    beside = TASKS["superglue-rte"].read(DATA / "superglue" / "RTE", "ax-b")
    assert beside == read("superglue-rte", "ax-b")


def test_broken_rows_of_qqp_are_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"train.tsv: left out 2 rows .* at line 6"):
        examples = read("qqp", "train")
    assert examples == read("qqp", "dev")


def test_the_published_order_of_classes():
    assert TASKS["mnli"].labels == TASKS["ax"].labels == (C, E, N)
    assert TASKS["rte"].labels == TASKS["qnli"].labels == (E, "not_entailment")
    assert TASKS["cb"].labels == (E, C, N) and TASKS["boolq"].labels == ("false", "true")
    assert TASKS["stsb"].labels == ()


def test_copa():
    examples = read("copa", "dev")
    assert examples[0] == ChoiceExample(
        "0", "The plants wilted because", ("It had not rained.", "The vase was blue."), 0
    )
    assert [e.text.rsplit(" ", 2)[1:] for e in examples[1:5]] == [
        ["wilted", "so"],
        ["cup", "so"],
        ["laughed", "because"],
        ["rang", "so"],
    ]
    assert [e.label for e in examples] == [0, 1, 0, 0, 0, 1, 0, 1]


def test_multirc():
    examples = read("multirc", "dev")
    assert [e.id for e in examples] == [
        "3-0-0",
        "3-0-1",
        "3-0-2",
        "3-1-3",
        "3-1-4",
        "4-2-5",
        "4-2-6",
        "4-2-7",
        "4-3-8",
    ]
    assert [e.group for e in examples] == ["3-0"] * 3 + ["3-1"] * 2 + ["4-2"] * 3 + ["4-3"]
    assert [e.label for e in examples] == list("101011010")
    assert examples[2].pair == "Who came? Jos\u00e9" and examples[2].text == examples[0].text


def test_record():
    examples = read("record", "dev")
    assert [e.id for e in examples] == [str(i) for i in range(10, 18)]
    assert examples[0] == EntityExample(
        "10",
        "Ana Ruiz sailed from C\u00e1diz to Cork in nine days. Ruiz, 34, left C\u00e1diz in May. "
        'Cork greeted her with "bells"',
        "@placeholder thanked the crew.",
        ((0, 8), (4, 8), (21, 26), (30, 34), (49, 53), (64, 69), (78, 82)),
        ("Ana Ruiz", "Ruiz"),
    )
    for example in examples:
        texts = {example.text[start:end] for start, end in example.entities}
        assert texts in ({"Ana Ruiz", "C\u00e1diz", "Cork", "Ruiz"}, {"Delft", "Wren", "Bos"})
        assert set(example.answers) <= texts and "@highlight" not in example.text
    assert examples[4].text.startswith("The Wren bridge in Delft reopened. Delft paid")
    assert examples[5].answers == ("Delft",)
    with pytest.raises(ValueError, match=r"here: entity \[3, 9\) is not in its text"):
        superglue.plain("an owl", [(3, 9)], "here")


def test_an_entity_keeps_its_place_whatever_the_marks():
    text = "\n@highlight\nOwl\n@highlight\nA crow!\n@highlight\nOwl"
    plain, spans = superglue.plain(text, [(12, 15), (text.rindex("Owl"), len(text))], "")
    assert plain == " Owl. A crow! Owl" and [plain[a:b] for a, b in spans] == ["Owl", "Owl"]


def test_of_several_pronouns_the_nearest_to_the_index_is_marked(tmp_path):
    text = 'He said "he left" when he was asked, he thought.'
    for index, expected in (
        (0, "*He* said"),
        (2, '"*he* left"'),
        (5, "when *he*"),
        (9, ", *he* t"),
    ):
        target = {"span1_text": "Tom", "span1_index": 0, "span2_text": "he", "span2_index": index}
        row = {"text": text, "target": target, "idx": 0, "label": True}
        (tmp_path / "val.jsonl").write_text(json.dumps(row))
        (example,) = TASKS["wsc"].read(tmp_path, "dev")
        assert expected in example.text and example.text.count("*") == 2


def test_candidates_as_a_choice():
    wnli = read("wnli-choice", "train")
    # Left out: a text with one candidate, and one with two that are right.
    assert [(e.id, e.label) for e in wnli] == [("0+1", 0), ("2+3", 0), ("4+5", 1)]
    assert wnli[2].options == ("The tile broke.", "The cup broke.")
    wsc = read("wsc-choice", "dev")
    assert [(e.id, e.label) for e in wsc] == [("0+1", 0), ("2+3", 1), ("4+5", 0), ("6+7", 0)]
    assert wsc[1].options[1] == "The owl left the barn because the barn was cold."
    assert wsc[3].options == (
        "Tom said he saw Sam with Sam's dog.",
        "Tom said he saw Sam with Tom's dog.",
    )


@pytest.mark.parametrize("name", ["boolq", "cb", "copa", "multirc", "record", "wic", "wsc"])
def test_superglue_test_files_have_no_labels(name, tmp_path):
    def unlabelled(x):
        if isinstance(x, dict):
            keep = {k: unlabelled(v) for k, v in x.items() if k not in ("label", "answers")}
            if "answers" in x and name == "multirc":
                keep["answers"] = unlabelled(x["answers"])
            return keep
        return [unlabelled(y) for y in x] if isinstance(x, list) else x

    lines = (DATA / "superglue" / superglue.FOLDERS[name] / "val.jsonl").read_text().splitlines()
    content = "".join(json.dumps(unlabelled(json.loads(line))) + "\n" for line in lines)
    (tmp_path / "test.jsonl").write_text(content)
    last = "answers" if name == "record" else "label"
    expected = [example._replace(**{last: None}) for example in read(name, "dev")]
    assert TASKS[name].read(tmp_path, "test") == expected
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match="train.jsonl: example .* has no label"):
        TASKS[name].read(tmp_path, "train")


@pytest.mark.parametrize("name", ["squad", "squad2"])
def test_squad(name):
    for split in ("train", "dev"):
        examples = read(name, split)
        assert [e.id for e in examples] == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"]
        for example in examples:
            for answer in example.answers:
                assert example.text[answer.start : answer.start + len(answer.text)] == answer.text
        assert examples[0].answers[:2] == (Answer("1821", 36), Answer("in 1821", 33))
        assert examples[0].text[0] == " ", "offsets count the leading space"
        empty = [e.id for e in examples if e.answers == ()]
        assert empty == (["a3", "b3"] if name == "squad2" else [])


def test_squad_errors(tmp_path):
    content = json.loads((DATA / "squad" / "dev-v1.1.json").read_text())
    question = content["data"][0]["paragraphs"][0]["qas"][1]
    question["answers"][0]["answer_start"] += 1
    (tmp_path / "dev.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="question a1: answer 'Ana Ruiz' is not at character 45"):
        TASKS["squad"].read(tmp_path, "dev")
    del question["answers"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    assert [e.answers is None for e in TASKS["squad"].read(tmp_path, "test")] == [False, True] + [
        False
    ] * 6
    (tmp_path / "train.json").write_text('{"data":\n [}')
    with pytest.raises(ValueError, match="train.json, line 2: not JSON"):
        TASKS["squad"].read(tmp_path, "train")


def test_race(tmp_path):
    examples = read("race", "dev")
    assert [e.id for e in examples] == [
        *("high7.txt-0", "high7.txt-1", "high12.txt-0", "high12.txt-1", "high12.txt-2"),
        *("middle3.txt-0", "middle3.txt-1", "middle3.txt-2"),
    ]
    assert [e.label for e in examples] == [0, 0, 1, 0, 3, 2, 1, 1]
    assert examples[0].options[0] == "Mills grind ." and examples[0].text == "Mills grind."
    assert examples[2].options == tuple(
        f"Who sat? {x}" for x in ("a mill", "an owl", 'a "barn"', "caf\u00e9s")
    )
    assert examples[6].options[1] == "From y to y ."
    assert read("race", "dev-middle") == examples[5:] and read("race", "dev-high") == examples[:5]
    with pytest.raises(
        FileNotFoundError, match=r"'train' .*train/middle/\*.txt, train/high/\*.txt"
    ):
        read("race", "train")
    bad = tmp_path / "dev" / "high" / "1.txt"
    bad.parent.mkdir(parents=True)
    row = {"article": "x", "questions": ["y?"], "options": [["a", "b", "c", "d"]], "answers": ["E"]}
    bad.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="1.txt: answer must be one of A, B, C, D, got 'E'"):
        TASKS["race"].read(tmp_path, "dev")


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_swag(ends, tmp_path):
    for path in (DATA / "swag").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\n", ends))
    examples = TASKS["swag"].read(tmp_path, "dev")
    assert [e.label for e in examples] == [0, 0, 1, 2, 0, 0, 3, 1]
    assert [e.id for e in examples] == [str(40 + 3 * i) for i in range(8)]
    assert examples[0].options == (
        *("He runs.", "He sings, loudly.", 'He says "no".', "He is a kite."),
    )
    assert examples[1].text == "The boat turns,\nslowly.", "a quoted cell goes on in the next line"
    assert examples[2].options[1] == "She pours\tcoffee."
    test = TASKS["swag"].read(tmp_path, "test")
    assert test == [example._replace(label=None) for example in examples]


def test_conll2003():
    examples = read("conll2003", "dev")
    assert len(examples) == 8 and "-DOCSTART-" not in {e.words[0] for e in examples}
    assert examples[0].words == ("EU", "rejects", "German", "call", ".")
    assert examples[0].tags == ("B-ORG", "O", "B-MISC", "O", "O")
    assert examples[1].tags == ("B-PER", "I-PER")
    assert examples[3].tags == ("B-LOC", "B-LOC", "B-PER")
    assert examples[5].tags == ("B-PER", "B-PER", "I-PER")
    assert examples[7].tags == ("B-LOC", "I-LOC", "B-ORG", "O")
    assert {tag for e in examples for tag in e.tags} <= set(TASKS["conll2003"].labels)
    for example in examples:
        assert conll.iob2(example.tags) == example.tags, "IOB2 stays as it is"


def test_upos():
    examples = read("upos", "test")
    assert examples[:3] == [
        TaggedExample("0", ("Do", "n't", "run", "!"), ("AUX", "PART", "VERB", "PUNCT")),
        TaggedExample("1", ("Ana", "sailed", "home"), ("PROPN", "VERB", "ADV")),
        TaggedExample("2", ("10 000", "owls"), ("NUM", "NOUN")),
    ]
    assert examples[3].words == ('"', "#", "owl", '"') and len(examples) == 8
    assert {tag for e in examples for tag in e.tags} == set(TASKS["upos"].labels)


# What is wrong is named, and where

HEADER = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "rte",
            "dev.tsv",
            HEADER + "0\ta\tb\tentailment\n1\ta\tb\n",
            "line 3: expected 4 .* got 3",
        ),
        ("rte", "dev.tsv", HEADER + "0\ta\tb\tc\tentailment\n", "line 2: expected 4 .* got 5"),
        ("rte", "dev.tsv", HEADER + "0\ta\tb\tneutral\n", "line 2: label must be one of entail"),
        ("rte", "dev.tsv", HEADER + "0\ta\tb\t\n", "line 2: label must be one of .* got ''"),
        ("rte", "dev.tsv", HEADER, "no example in .*dev.tsv"),
        ("rte", "dev.tsv", "index\ts1\tlabel\n0\ta\t1\n", "line 2: no 'sentence1'; it has index"),
        ("cola", "dev.tsv", "gj04\t1\t\tfine.\ngj04\t1\tbroken\n", "line 2: expected 4 .* got 3"),
        ("cola", "dev.tsv", "gj04\t1\t\t\xff\n".encode("latin-1"), "is not UTF-8: line 1, byte 9"),
        (
            "stsb",
            "dev.tsv",
            "sentence1\tsentence2\tscore\na\tb\tnan\n",
            "line 2: expected a number",
        ),
        ("copa", "val.jsonl", '{"idx": 0, "question": "why"}\n', "line 1: question must be cause"),
        ("boolq", "val.jsonl", '{"idx": 0, "passage": "x"}\n', "line 1: no 'question'; it has idx"),
        ("boolq", "val.jsonl", "{}\n{\n", "line 1: no 'idx'|line 1: no 'passage'"),
        ("swag", "val.csv", '"a\nb",c\nd\n', "line 3: expected 2 columns, a\nb, c; got 1"),
        ("conll2003", "eng.testa", "EU NNP I-NP I-ORG\nrejects\n", "line 2: expected at least 2"),
        ("upos", "x-ud-dev.conllu", "1\tDo\tdo\n", "line 1: expected at least 4 columns, got 3"),
        ("squad", "dev-v1.1.json", "[]", "expected SQuAD's layout"),
    ],
)
def test_bad_rows(name, file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        TASKS[name].read(tmp_path, "dev")


@pytest.mark.parametrize(
    ("name", "looked_for"),
    [
        ("cola", "dev.tsv, CoLA/dev.tsv"),
        ("mnli", "dev_matched.tsv, dev.tsv, MNLI/dev_matched.tsv"),
        ("boolq", "val.jsonl, dev.jsonl, BoolQ/val.jsonl"),
        ("squad2", "dev-v2.0.json, dev.json"),
        ("conll2003", "eng.testa, valid.txt"),
        ("upos", r"\*-ud-dev.conllu"),
        ("classification", "dev.jsonl, dev.tsv, dev.csv"),
    ],
)
def test_a_missing_file_says_what_was_looked_for(name, looked_for, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'dev' in .*looked for {looked_for}"):
        TASKS[name].read(tmp_path, "dev")


@pytest.mark.parametrize("name", [n for n in TASKS if not n.endswith("-choice")])
def test_an_unknown_split(name):
    with pytest.raises(ValueError, match="split of .* must be one of .*; got 'validation'"):
        TASKS[name].read(DATA, "validation")
