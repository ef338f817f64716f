"""Users' own data: task files, and the tables that they describe."""

import json

import pytest

from fastdeberta.finetuning.examples import (
    Answer,
    ChoiceExample,
    SpanExample,
    TaggedExample,
    TextExample,
)
from fastdeberta.finetuning.readers import table
from fastdeberta.finetuning.tasks import TASKS, find_task


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Without a task file: what the columns are called is known


@pytest.mark.parametrize(
    "files",
    [
        {"dev_jsonl": lines({"text": 'a "b"', "label": 1}, {"label": "no", "text": "c"})},
        {"dev_csv": 'label,text\r\n1,"a ""b"""\r\nno,c\r\n'},
        {"dev_tsv": '\ufefflabel\ttext\n1\ta "b"\n\nno\tc\n'},  # Quotes are nothing special.
    ],
    ids=list,
)
def test_classification(files, tmp_path):
    examples = TASKS["classification"].read(write(tmp_path, **files), "dev")
    assert examples == [TextExample("0", 'a "b"', None, "1"), TextExample("1", "c", None, "no")]


def test_the_other_defaults(tmp_path):
    write(
        tmp_path,
        train_csv="id,text,label\nx7,caf\u00e9,2.5\n",
        dev_jsonl=lines({"text": "a", "options": ["b", "c"], "label": 1}),
    )
    assert TASKS["regression"].read(tmp_path, "train") == [
        TextExample("x7", "caf\u00e9", None, 2.5)
    ]
    assert TASKS["choice"].read(tmp_path, "dev") == [ChoiceExample("0", "a", ("b", "c"), 1)]
    write(tmp_path, dev_jsonl=lines({"words": ["a", "b c"], "tags": ["X", "Y"]}))
    assert TASKS["tagging"].read(tmp_path, "dev") == [TaggedExample("0", ("a", "b c"), ("X", "Y"))]
    write(tmp_path, dev_jsonl=lines({"question": "q", "text": "an owl", "answer": "owl"}))
    assert TASKS["span"].read(tmp_path, "dev") == [
        SpanExample("0", "q", "an owl", (Answer("owl", 3),))
    ]


def test_test_files_need_no_labels(tmp_path):
    write(tmp_path, test_csv="text\nb\n", train_csv="text\nb\n", dev_csv="text,label\na,\n")
    assert TASKS["classification"].read(tmp_path, "test") == [TextExample("0", "b")]
    with pytest.raises(ValueError, match="train.csv, line 2: no 'label'; it has text"):
        TASKS["classification"].read(tmp_path, "train")
    with pytest.raises(ValueError, match="dev.csv, line 2: 'label' is empty"):
        TASKS["classification"].read(tmp_path, "dev")
    write(tmp_path, test_csv="question,text\nq,an owl\n")
    assert TASKS["span"].read(tmp_path, "test") == [SpanExample("0", "q", "an owl")]
    write(tmp_path, test_csv="words\nan owl\n")
    assert TASKS["tagging"].read(tmp_path, "test") == [TaggedExample("0", ("an", "owl"))]


# Task files

PAIRS = """
task: classification
files: {train: a.tsv, dev: b.csv}
columns: {text: s1, pair: s2, label: gold, id: key}
labels: ["no", maybe, "yes"]
metrics: [macro_f1, accuracy]
recipe: {epochs: 7, max_length: 64}
"""


def test_a_task_file(tmp_path):
    write(
        tmp_path,
        pairs_yaml=PAIRS,
        a_tsv='key\ts1\ts2\tgold\nk1\t"one\ttwo\tyes\n',
        b_csv='gold,s1,s2,key\nno,"x,\ny",z,k2\n',
    )
    task = find_task(tmp_path / "pairs.yaml")
    assert task.name == "pairs" and task.labels == ("no", "maybe", "yes")
    assert task.head == "sequence" and task.metrics == ("macro_f1", "accuracy")
    assert task.recipe == {**TASKS["classification"].recipe, "epochs": 7, "max_length": 64}
    # Files are found in the data's directory, or beside the task file.
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "data"):
        assert task.read(folder, "train") == [TextExample("k1", '"one', "two", "yes")]
        assert task.read(folder, "dev") == [TextExample("k2", "x,\ny", "z", "no")]
    write(tmp_path / "data", a_tsv="key\ts1\ts2\tgold\nk3\ta\tb\tno\n")
    assert task.read(tmp_path / "data", "train")[0].id == "k3"
    write(tmp_path, b_csv="gold,s1,s2,key\nNo,x,z,k2\n")
    with pytest.raises(ValueError, match="b.csv, line 2: label must be one of no, maybe, yes; got"):
        task.read(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match="no file .*'test' in .*looked for test.jsonl"):
        task.read(tmp_path, "test")
    (tmp_path / "a.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="no file a.tsv of split 'train' in .* or "):
        task.read(tmp_path / "..", "train")


@pytest.mark.parametrize(
    ("kind", "label", "right"), [("index", "2", 2), ("letter", "B", 1), ("text", "rust, red", 2)]
)
def test_choices(kind, label, right, tmp_path):
    write(
        tmp_path,
        x_yaml=f"task: choice\ncolumns: {{options: [a, b, c]}}\nlabel_type: {kind}",
        dev_csv=f'text,a,b,c,label\nt,moss,lead,"rust, red","{label}"\n',
    )
    task = find_task(tmp_path / "x.yaml")
    expected = ChoiceExample("0", "t", ("moss", "lead", "rust, red"), right)
    assert task.read(tmp_path, "dev") == [expected]
    write(tmp_path, dev_csv="text,a,b,c,label\nt,moss,lead,rust,3\n")
    with pytest.raises(ValueError, match="dev.csv, line 2: label must be one of .*; got '3'"):
        task.read(tmp_path, "dev")


def test_tags_in_columns(tmp_path):
    write(
        tmp_path,
        x_yaml="task: tagging\ncolumns: {words: 1, tags: 0}\nfiles: {dev: x.bio}\nlabels: [O, B-X]",
        x_bio="I-X\tNew York\n\nO\tcaf\u00e9\r\n",
        test_conllu="1\tan\tan\tDET\n2\towl\towl\tNOUN\n",
    )
    task = find_task(tmp_path / "x.yaml")
    assert task.read(tmp_path, "dev") == [
        TaggedExample("0", ("New York",), ("B-X",)),
        TaggedExample("1", ("caf\u00e9",), ("O",)),
    ]
    assert TASKS["tagging"].read(tmp_path, "test") == [
        TaggedExample("0", ("an", "owl"), ("DET", "NOUN"))
    ]
    write(tmp_path, x_bio="I-Y\ta\n")
    with pytest.raises(
        ValueError, match="x.bio, sentence 0: label must be one of O, B-X; got 'B-Y"
    ):
        task.read(tmp_path, "dev")
    write(tmp_path, x_bio="", x_yaml="task: tagging\ncolumns: {words: form}\nfiles: {dev: x.bio}")
    with pytest.raises(ValueError, match="columns.words must be a number for x.bio, .* 'form'"):
        find_task(tmp_path / "x.yaml").read(tmp_path, "dev")
    write(tmp_path, dev_csv="words,tags\nan owl,DET\n")
    with pytest.raises(ValueError, match="dev.csv, line 2: 2 words, but 1 tags"):
        TASKS["tagging"].read(tmp_path, "dev")


def test_spans(tmp_path):
    text = "Owls eat mice; mice eat seeds."
    write(
        tmp_path,
        x_yaml="task: span\nfiles: {dev: x.json, train: t.jsonl}\ncolumns: {text: context}",
        t_jsonl=lines(
            {"question": "a", "context": text, "answer": "mice", "start": 15},
            {"question": "b", "context": text, "answer": "mice"},
            {"question": "c", "context": text, "answer": ""},
            {"question": "d", "context": text, "answers": [{"text": "seeds", "start": 24}] * 2},
            {"question": "e", "context": text, "answers": []},
        ),
        x_json=json.dumps(
            {"data": [{"paragraphs": [{"context": text, "qas": [{"id": "q", "question": "f"}]}]}]}
        ),
    )
    task = find_task(tmp_path / "x.yaml")
    assert [example.answers for example in task.read(tmp_path, "train")] == [
        (Answer("mice", 15),),
        (Answer("mice", 9),),
        (),
        (Answer("seeds", 24),) * 2,
        (),
    ]
    assert task.read(tmp_path, "dev") == [SpanExample("q", "f", text)]
    for answer, message in (
        ({"answer": "mice", "start": 10}, "answer 'mice' is not at character 10"),
        ({"answer": "mouse"}, "answer 'mouse' is not in its text"),
        ({"answers": ["mice"]}, "answers must be a list of objects"),
        ({}, "no 'answer'; it has question, context"),
    ):
        write(tmp_path, t_jsonl=lines({"question": "a", "context": text} | answer))
        with pytest.raises(ValueError, match=f"t.jsonl, line 1: {message}"):
            task.read(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "task: clasification",
            "task must be one of classification, regression, .*'clasification'",
        ),
        ("task: span\nfile: {}", "unknown config key 'file'; did you mean 'files'"),
        ("task: span\nfolder: x", "unknown config key 'folder'"),
        ("task: span\nfiles: {valid: x}", "unknown config key 'files.valid'"),
        ("task: span\nfiles: {dev: 3}", "files.dev must be a file's name, got 3"),
        ("task: span\ncolumns: {label: x}", "unknown config key 'columns.label'"),
        ("task: choice\ncolumns: {options: [a]}", "columns.options must name at least two"),
        ("task: span\ncolumns: {text: 3}", "columns.text must be a column's name, got 3"),
        ("task: tagging\ncolumns: {tags: [1]}", "columns.tags must be a column's name or number"),
        ("task: span\ncolumns: text", "columns must hold key: value pairs, got 'text'"),
        ("task: classification\nlabels: a", "labels must be a list, got 'a'"),
        ("task: classification\nlabels: [no, yes]", "labels: YAML reads False there; put it in"),
        ("task: classification\nlabels: [a, a]", "labels has one of them twice: a, a"),
        ("task: regression\nlabels: [a]", "labels is for classification and tagging, not for reg"),
        ("task: span\nlabel_type: letter", "label_type is for choice, not for span"),
        ("task: choice\nlabel_type: number", "label_type must be one of index, letter, text; got"),
        ("task: span\nmetrics: [bleu]", "metrics must be among accuracy, .*; got 'bleu'"),
        ("[", "is not valid YAML"),
    ],
)
def test_bad_task_files(text, message, tmp_path):
    write(tmp_path, x_yaml=text)
    with pytest.raises(ValueError, match=f"x.yaml.*{message}"):
        find_task(tmp_path / "x.yaml")


def test_a_missing_task_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such config file: .*x.yml"):
        find_task(tmp_path / "x.yml")


def test_other_errors(tmp_path):
    task = table.TaskFile("classification", files={"dev": "x.xlsx"})
    write(tmp_path, x_xlsx="")
    with pytest.raises(ValueError, match="x.xlsx: expected a .jsonl, .tsv or .csv file"):
        table.read(task, tmp_path, "dev")
    write(tmp_path, dev_csv="text,label\n" + 200_000 * "x" + ",1\n")
    with pytest.raises(ValueError, match="dev.csv, line 2: field larger than"):
        TASKS["classification"].read(tmp_path, "dev")
    write(tmp_path, train_jsonl='{"text": "a", "label": 1}\n[]\n')
    with pytest.raises(ValueError, match="train.jsonl, line 2: expected a JSON object"):
        TASKS["classification"].read(tmp_path, "train")
    write(tmp_path, train_jsonl='{"text": "a", "label": "high"}\n')
    with pytest.raises(ValueError, match="line 1: expected a number as label, got 'high'"):
        TASKS["regression"].read(tmp_path, "train")
