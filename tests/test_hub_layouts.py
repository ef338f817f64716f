"""The hub's layouts: what `datasets` has saved is read as the files of the benchmarks are."""

from pathlib import Path

import datasets
import pytest

from fastdeberta.finetuning.examples import (
    Answer,
    ChoiceExample,
    EntityExample,
    TaggedExample,
    TextExample,
)
from fastdeberta.finetuning.readers import hub
from fastdeberta.finetuning.tasks import TASKS

E, N, C = "entailment", "neutral", "contradiction"

ROWS = [
    {"premise": f'p "{i}"', "hypothesis": f"h{i}\n", "label": i % 3, "idx": i} for i in range(8)
]
NAMES = datasets.ClassLabel(names=[E, N, C])
HUB_NLI = [TextExample(str(i), f'p "{i}"', f"h{i}\n", (E, N, C)[i % 3]) for i in range(8)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


@pytest.mark.parametrize("layout", ["disk", "parquet", "data/parquet", "jsonl"])
def test_hub_layouts(layout, tmp_path):
    data = datasets.Dataset.from_list(ROWS).cast_column("label", NAMES)
    test = datasets.Dataset.from_list([row | {"label": -1} for row in ROWS])
    test = test.cast_column("label", NAMES)
    splits = {"train": data, "validation_matched": data, "test_matched": test}
    if layout == "disk":
        datasets.DatasetDict(splits).save_to_disk(tmp_path)
    for name, part in splits.items():
        if layout == "parquet":
            part.to_parquet(tmp_path / f"{name}.parquet")
        elif layout == "data/parquet":
            (tmp_path / "data").mkdir(exist_ok=True)
            part.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
        elif layout == "jsonl":
            part.to_json(tmp_path / f"{name}.jsonl")
    assert TASKS["mnli"].read(tmp_path, "train") == HUB_NLI
    assert TASKS["mnli"].read(tmp_path, "dev") == HUB_NLI
    assert TASKS["mnli"].read(tmp_path, "test") == [e._replace(label=None) for e in HUB_NLI]
    with pytest.raises(FileNotFoundError, match="no split 'validation_mismatched' in"):
        TASKS["mnli"].read(tmp_path, "dev-mm")


def test_hub_names_in_another_order_keep_their_meaning(tmp_path):
    other = datasets.ClassLabel(names=[C, N, E])
    data = datasets.Dataset.from_list(ROWS).cast_column("label", other)
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path)
    assert [e.label for e in TASKS["mnli"].read(tmp_path, "train")][:3] == [C, N, E]


MULTIRC = {"paragraph": 0, "question": 1, "answer": 2}
SPANS = {"text": ["Owl"], "start": [0], "end": [3]}
HUB = {
    "cola": ({"sentence": "a", "label": 1, "idx": 4}, TextExample("4", "a", None, "1")),
    "stsb": (
        {"sentence1": "a", "sentence2": "b", "label": 2.5, "idx": 4},
        TextExample("4", "a", "b", 2.5),
    ),
    "qnli": (
        {"question": "a", "sentence": "b", "label": 1, "idx": 4},
        TextExample("4", "a", "b", "not_entailment"),
    ),
    "boolq": (
        {"question": "a", "passage": "b", "label": 1, "idx": 4},
        TextExample("4", "b", "a", "true"),
    ),
    "multirc": (
        {"paragraph": "a", "question": "b", "answer": "c", "idx": MULTIRC, "label": 1},
        TextExample("0-1-2", "a", "b c", "1", "0-1"),
    ),
    "record": (
        {
            "passage": "Owl\n@highlight\nOwl",
            "query": "@placeholder",
            "entities": ["Owl"],
            "entity_spans": SPANS,
            "answers": ["Owl"],
            "idx": {"passage": 0, "query": 7},
        },
        EntityExample("7", "Owl. Owl", "@placeholder", ((0, 3),), ("Owl",)),
    ),
    "wsc": (
        {
            "text": "Al fell. He hid.",
            "span1_index": 0,
            "span1_text": "Al",
            "span2_index": 2,
            "span2_text": "He",
            "idx": 4,
            "label": 0,
        },
        TextExample("4", "Al fell. *He* hid.", "Al", "false"),
    ),
    "race": (
        {"example_id": "high1.txt", "article": "a", "question": "b", "options": list("cdef")}
        | {"answer": "D"},
        ChoiceExample("high1.txt-0", "a", ("b c", "b d", "b e", "b f"), 3),
    ),
    "swag": (
        {"sent1": "a", "sent2": "b", "label": 2} | {f"ending{i}": str(i) for i in range(4)},
        ChoiceExample("0", "a", ("b 0", "b 1", "b 2", "b 3"), 2),
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_hub_columns(name, tmp_path):
    row, expected = HUB[name]
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "validation.parquet")
    assert TASKS[name].read(tmp_path, "dev") == [expected]


def test_hub_columns_with_lists(tmp_path):
    (tmp_path / "spans").mkdir()
    answers = {"text": ["owl"], "answer_start": [3]}
    row = {"id": "q", "context": "an owl", "question": "who?", "answers": answers}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "spans" / "validation.parquet")
    (example,) = TASKS["squad"].read(tmp_path / "spans", "dev")
    assert example.answers == (Answer("owl", 3),) and example.id == "q"
    tags = datasets.ClassLabel(names=list(TASKS["conll2003"].labels))
    data = datasets.Dataset.from_list([{"id": "0", "tokens": ["Ana", "ran"], "ner_tags": [1, 0]}])
    data = data.cast_column("ner_tags", datasets.List(tags))
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "tags")
    expected = [TaggedExample("0", ("Ana", "ran"), ("B-PER", "O"))]
    assert TASKS["conll2003"].read(tmp_path / "tags", "dev") == expected


def test_a_hub_name_is_loaded_with_the_tasks_config(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS).cast_column("label", NAMES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert TASKS["mnli"].read(Path("datasets:nyu-mll/glue"), "dev") == HUB_NLI
    assert asked == [(("nyu-mll/glue", "mnli"), {"split": "validation_matched"})]


def test_users_data_in_the_hubs_layout(tmp_path):
    names = datasets.ClassLabel(names=["no", "yes"])
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}]).cast_column("label", names)
    data.to_parquet(tmp_path / "validation.parquet")
    assert TASKS["classification"].read(tmp_path, "dev") == [TextExample("0", "a", None, "yes")]


def test_what_is_not_the_hubs_layout():
    data = Path(__file__).parent / "data"
    folders = [data, *(path for path in data.rglob("*") if path.is_dir())]
    assert len(folders) > 20 and not any(map(hub.is_hub, folders))
    assert hub.is_hub("datasets:glue")
