"""Does our trainer lose anything? `fastdeberta finetune` beside a plain loop over transformers'
BertModel: same weights, same data, same recipe, several seeds; and the same with SiFT.

python -m benchmarks.finetuning data SOURCES RUNS    writes RUNS/data, a directory a task
python -m benchmarks.finetuning run RUNS MODEL SIDE [TASK...]    trains; SIDE: ours, sift, plain
python -m benchmarks.finetuning table RUNS    prints the Markdown of what ran

SOURCES holds glue/{CoLA,RTE,STS-B}/*.tsv, squad/xquad.en.json and ud/*.conllu; MODEL is a BERT in
transformers' layout. The plain loop knows nothing of this package: it has transformers' tokenizer,
model and schedule, padded batches, torch's AdamW and bfloat16 autocast, and scores by scikit-learn
and scipy.
"""

import argparse
import json
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdeberta.datasets import wiki_leads

SIDES = ("ours", "sift", "plain")
PART, EVALUATION_BATCH = 16, 32
EPSILON, CLIP, WARMUP = 1e-6, 1.0, 0.1
IGNORED = -100  # a token without a label; torch's own number for it
STRIDE = 128
N_BEST, LONGEST_ANSWER = 20, 30


@dataclass(frozen=True)
class Recipe:
    """What both sides are given. score: of metrics.json, and of the plain loop's result."""

    head: str  # "sequence", "span", "token"
    score: str
    epochs: int
    max_length: int
    options: tuple[str, ...]  # which task, to fastdeberta
    learning_rate: float = 3e-4
    batch_size: int = 32
    layer_decay: float = 0.8
    dropout: float = 0.1


# By ELECTRA-small's recipe, whose size is MiniLM's; epochs by what two cores do in minutes.
RECIPES = {
    "cola": Recipe("sequence", "matthews", 3, 128, ("--task", "cola")),
    "rte": Recipe("sequence", "accuracy", 4, 128, ("--task", "rte")),
    "stsb": Recipe("sequence", "pearson_spearman", 2, 128, ("--task", "stsb")),
    "topics": Recipe("sequence", "accuracy", 1, 32, ("--task", "classification")),
    "xquad": Recipe("span", "f1", 2, 384, ("--task-file", "task.yaml"), batch_size=16),
    "upos": Recipe("token", "tag_accuracy", 3, 128, ("--task", "upos")),
}
# Of the sources' columns in GLUE's files: text, pair, label.
COLUMNS = {"cola": (3, None, 1), "rte": (1, 2, 3), "stsb": (7, 8, 9)}


def write_data(sources: Path, target: Path) -> None:
    """Each task's files, as the command reads them."""
    for name, folder in (("cola", "CoLA"), ("rte", "RTE"), ("stsb", "STS-B")):
        shutil.copytree(sources / "glue" / folder, target / name / folder, dirs_exist_ok=True)
    (target / "upos").mkdir(exist_ok=True)
    # The training files: the treebank's dev split; its test split is what is scored.
    for split, source in (("train", "dev"), ("dev", "test")):
        shutil.copy(
            sources / "ud" / f"en_ewt-ud-{source}.conllu",
            target / "upos" / f"en_ewt-ud-{split}.conllu",
        )
    _write_topics(target / "topics")
    _write_questions(sources / "squad" / "xquad.en.json", target / "xquad")


def _write_topics(target: Path) -> None:
    articles = [article for article in wiki_leads() if article.topic != "Uncategorized"]
    random.Random(0).shuffle(articles)
    lines = [json.dumps({"text": a.text, "label": a.topic}) + "\n" for a in articles]
    target.mkdir(exist_ok=True)
    cut = len(lines) * 4 // 5
    for split, part in (("train", lines[:cut]), ("dev", lines[cut:])):
        (target / f"{split}.jsonl").write_text("".join(part))


def _write_questions(source: Path, target: Path) -> None:
    """The first 80 % of the paragraphs to train on, the rest to score."""
    articles = json.loads(source.read_text("utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    target.mkdir(exist_ok=True)
    cut = len(paragraphs) * 4 // 5
    for split, part in (("train", paragraphs[:cut]), ("dev", paragraphs[cut:])):
        content = {"version": "1.1", "data": [{"title": split, "paragraphs": part}]}
        (target / f"{split}.json").write_text(json.dumps(content))
    files = "{train: train.json, dev: dev.json}"
    (target / "task.yaml").write_text(f"task: span\nname: xquad\nfiles: {files}\n")


def train_ours(name: str, data: Path, model: Path, seed: int, out: Path, sift: bool) -> float:
    """The score of one run of the command."""
    recipe = RECIPES[name]
    options = [str(data / o) if o.endswith(".yaml") else o for o in recipe.options]
    settings = {
        "output": out,
        "seed": seed,
        "epochs": recipe.epochs,
        "max_length": recipe.max_length,
        "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size,
        "layer_decay": recipe.layer_decay,
        "dropout": recipe.dropout,
        "weight_decay": 0.0,
        "warmup_fraction": WARMUP,
        "epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "precision": "bf16",
    }
    command = [sys.executable, "-m", "fastdeberta", "finetune", *options]
    command += ["--data-dir", str(data), "--model", str(model), *(["--sift"] if sift else [])]
    command += [f"{key}={value}" for key, value in settings.items()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "metrics.json").read_text())[recipe.score]


class Plain(nn.Module):
    """transformers' BertModel under a head of ELECTRA's kind."""

    def __init__(self, model: Path, recipe: Recipe, outputs: int):
        from transformers import BertModel

        super().__init__()
        self.encoder = BertModel.from_pretrained(model, add_pooling_layer=False)
        hidden = self.encoder.config.hidden_size
        dropout = nn.Dropout(recipe.dropout)
        self.kind = recipe.head
        if recipe.head == "sequence":
            dense = nn.Linear(hidden, hidden)
            last = nn.Linear(hidden, outputs)
            self.head = nn.Sequential(dropout, dense, nn.GELU(), dropout, last)
        elif recipe.head == "token":
            self.head = nn.Sequential(dropout, nn.Linear(hidden, outputs))
        else:
            self.head = nn.Sequential(nn.Linear(hidden, 2))
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.encoder.config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        keys = ("input_ids", "attention_mask", "token_type_ids")
        hidden = self.encoder(**{key: batch[key] for key in keys}).last_hidden_state
        return self.head(hidden[:, 0] if self.kind == "sequence" else hidden)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean over what is scored."""
        logits, labels = self(batch).float(), batch["labels"]
        cross_entropy = nn.functional.cross_entropy
        if self.kind == "span":
            start, end = logits.unbind(-1)
            return (cross_entropy(start, labels[:, 0]) + cross_entropy(end, labels[:, 1])) / 2
        if self.kind == "token":
            return cross_entropy(logits.flatten(0, 1), labels.flatten())
        if labels.is_floating_point():
            return nn.functional.mse_loss(logits.squeeze(-1), labels)
        return cross_entropy(logits, labels)

    def scored(self, batch: dict[str, Tensor]) -> int:
        """Tokens with a label, or rows."""
        labels = batch["labels"]
        return int((labels != IGNORED).sum()) if self.kind == "token" else len(labels)

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """A group of parameters for each depth, with its learning rate."""
        layers = self.encoder.config.num_hidden_layers
        rates: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            layer = re.search(r"layer\.(\d+)\.", name)
            depth = layers - int(layer[1]) if layer else layers + 1
            depth = 0 if name.startswith("head") else depth
            rate = recipe.learning_rate * recipe.layer_decay**depth
            rates.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]


Rows = list[dict[str, Any]]


def train_plain(name: str, data: Path, model: Path, seed: int) -> float:
    """The score of one run of the plain loop."""
    from transformers import AutoTokenizer, get_linear_schedule_with_warmup

    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, outputs, judge = READERS[recipe.head](name, data, recipe, tokenizer)
    torch.manual_seed(seed)
    network = Plain(model, recipe, outputs)
    optimizer = torch.optim.AdamW(network.groups(recipe), eps=EPSILON, weight_decay=0.0, fused=True)
    steps = round(recipe.epochs * len(train) / recipe.batch_size)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    order: list[int] = []
    network.train()
    for _ in range(steps):
        while len(order) < recipe.batch_size:
            order += torch.randperm(len(train)).tolist()
        rows, order = order[: recipe.batch_size], order[recipe.batch_size :]
        # In parts of similar lengths, which takes less padding; their gradients add up.
        batch = sorted((train[row] for row in rows), key=lambda row: len(row["input_ids"]))
        parts = [_padded(batch[i : i + PART]) for i in range(0, len(batch), PART)]
        whole = sum(network.scored(part) for part in parts)
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                loss = network.loss(part)
            (loss * network.scored(part) / whole).backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    network.eval()
    return judge(network)


def _padded(rows: Rows) -> dict[str, Tensor]:
    """Lists, one value a token, are padded to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for key in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        values = [row[key] for row in rows]
        if isinstance(values[0], list):
            fill = [IGNORED if key == "labels" else 0]
            values = [value + fill * (longest - len(value)) for value in values]
        batch[key] = torch.tensor(values)
    return batch


@torch.no_grad()
def _logits(network: Plain, rows: Rows) -> Iterator[np.ndarray]:
    """Of every row, without padding."""
    for start in range(0, len(rows), EVALUATION_BATCH):
        part = rows[start : start + EVALUATION_BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            found = network(_padded(part)).float().numpy()
        for row, logits in zip(part, found, strict=True):
            yield logits if network.kind == "sequence" else logits[: len(row["input_ids"])]


Judged = tuple[Rows, int, Callable[[Plain], float]]


def read_texts(name: str, data: Path, recipe: Recipe, tokenizer: Any) -> Judged:
    """Training rows, how many outputs, and what scores a network on the dev split."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    splits = [_texts(name, data, split) for split in ("train", "dev")]
    classes = sorted({label for _, _, label in splits[0]}) if name != "stsb" else []
    train, dev = (
        [
            {
                **tokenizer(text, pair, truncation=True, max_length=recipe.max_length),
                "labels": classes.index(label) if classes else float(label),
            }
            for text, pair, label in split
        ]
        for split in splits
    )
    right = [row["labels"] for row in dev]

    def judge(network: Plain) -> float:
        logits = np.stack(list(_logits(network, dev)))
        if name == "stsb":
            found = [measure(right, logits[:, 0])[0] for measure in (pearsonr, spearmanr)]
            return float(np.mean(found))
        measure = matthews_corrcoef if name == "cola" else accuracy_score
        return float(measure(right, logits.argmax(-1)))

    return train, len(classes) or 1, judge


def _texts(name: str, data: Path, split: str) -> list[tuple[str, str | None, str]]:
    if name == "topics":
        lines = map(json.loads, (data / f"{split}.jsonl").read_text().splitlines())
        return [(line["text"], None, line["label"]) for line in lines]
    file = next(data.glob(f"*/{split}.tsv"))
    rows = [line.split("\t") for line in file.read_text("utf-8").splitlines()]
    text, pair, label = COLUMNS[name]
    rows = rows if name == "cola" else rows[1:]
    return [(row[text], None if pair is None else row[pair], row[label]) for row in rows]


def read_sentences(name: str, data: Path, recipe: Recipe, tokenizer: Any) -> Judged:
    """As `read_texts`; the score is the accuracy of the words' tags."""
    splits = [_sentences(next(data.glob(f"*-{split}.conllu"))) for split in ("train", "dev")]
    tags = sorted({tag for sentence in splits[0] for _, tag in sentence})

    def row(sentence: list[tuple[str, str]]) -> dict[str, Any]:
        words = [word for word, _ in sentence]
        found = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=recipe.max_length
        )
        labels, before = [], None
        for word in found.word_ids():
            scored = word is not None and word != before
            tag = sentence[word][1] if scored else None
            labels.append(tags.index(tag) if tag in tags else -1 if scored else IGNORED)
            before = word
        return {**found, "labels": labels}

    train, dev = ([row(sentence) for sentence in split] for split in splits)
    words = sum(map(len, splits[1]))

    def judge(network: Plain) -> float:
        hits = 0
        for row, logits in zip(dev, _logits(network, dev), strict=True):
            labels = np.array(row["labels"])
            hits += int((logits.argmax(-1) == labels)[labels >= 0].sum())
        return hits / words

    return train, len(tags), judge


def _sentences(path: Path) -> list[list[tuple[str, str]]]:
    found = []
    for block in path.read_text("utf-8").strip().split("\n\n"):
        rows = [line.split("\t") for line in block.splitlines() if line[0] != "#"]
        found.append([(row[1], row[3]) for row in rows if row[0].isdigit()])
    return found


def read_questions(name: str, data: Path, recipe: Recipe, tokenizer: Any) -> Judged:
    """As `read_texts`; the score is SQuAD's F1."""
    train = []
    for question in _questions(data / "train.json"):
        answer = question["answers"][0]
        first, last = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        for row, places in _windows(question, recipe, tokenizer):
            inside = [i for i, (a, b) in places.items() if a < last and b > first]
            whole = inside and places[inside[0]][0] <= first and places[inside[-1]][1] >= last
            train.append(row | {"labels": (inside[0], inside[-1]) if whole else (0, 0)})
    dev = _questions(data / "dev.json")
    windows = [
        (number, {**row, "labels": (0, 0)}, places)
        for number, question in enumerate(dev)
        for row, places in _windows(question, recipe, tokenizer)
    ]

    def judge(network: Plain) -> float:
        best = [(-np.inf, "")] * len(dev)
        found = _logits(network, [row for _, row, _ in windows])
        for (number, _, places), logits in zip(windows, found, strict=True):
            score, first, last = _best_span(logits, places)
            text = dev[number]["context"][first:last]
            best[number] = max(best[number], (score, text))
        pairs = zip(best, dev, strict=True)
        scores = [max(_f1(x, a["text"]) for a in question["answers"]) for (_, x), question in pairs]
        return statistics.mean(scores)

    return train, 2, judge


def _questions(path: Path) -> Rows:
    paragraphs = json.loads(path.read_text("utf-8"))["data"][0]["paragraphs"]
    return [{**qa, "context": each["context"]} for each in paragraphs for qa in each["qas"]]


def _windows(
    question: dict[str, Any], recipe: Recipe, tokenizer: Any
) -> Iterator[tuple[dict[str, Any], dict[int, tuple[int, int]]]]:
    """Each part's row, and of its tokens of the context the characters."""
    found = tokenizer(
        question["question"],
        question["context"],
        truncation="only_second",
        max_length=recipe.max_length,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    offsets = found.pop("offset_mapping")
    found.pop("overflow_to_sample_mapping")
    for part, of_part in enumerate(offsets):
        sides = found.sequence_ids(part)
        places = {i: place for i, place in enumerate(of_part) if sides[i] == 1}
        yield {key: values[part] for key, values in found.items()}, places


def _best_span(logits: np.ndarray, places: dict[int, tuple[int, int]]) -> tuple[float, int, int]:
    """The best of the n best starts with the n best ends: score, first and last character."""
    starts, ends = (np.argsort(-logits[:, side])[:N_BEST] for side in (0, 1))
    spans = [
        (float(logits[i, 0] + logits[j, 1]), places[i][0], places[j][1])
        for i in starts.tolist()
        for j in ends.tolist()
        if i in places and j in places and i <= j < i + LONGEST_ANSWER
    ]
    return max(spans, default=(-np.inf, 0, 0))


def _f1(answer: str, right: str) -> float:
    """SQuAD 1.1's, from 0 to 1: of words without case, punctuation and articles."""
    words = []
    for text in (answer, right):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        words.append(Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()))
    common = sum((words[0] & words[1]).values())
    return 2 * common / (sum(words[0].values()) + sum(words[1].values())) if common else 0.0


READERS = {"sequence": read_texts, "token": read_sentences, "span": read_questions}


def run(runs: Path, model: Path, side: str, tasks: Sequence[str], seeds: int) -> None:
    """Trains what RUNS/results.SIDE.json does not hold yet."""
    store = runs / f"results.{side}.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for name in tasks:
        for seed in range(seeds):
            done = results.setdefault(name, {})
            if str(seed) in done:
                continue
            data, out = runs / "data" / name, runs / side / f"{name}-{seed}"
            start = time.perf_counter()
            if side == "plain":
                score = train_plain(name, data, model, seed)
            else:
                score = train_ours(name, data, model, seed, out, sift=side == "sift")
                shutil.rmtree(out)
            done[str(seed)] = {"score": score, "minutes": (time.perf_counter() - start) / 60}
            store.write_text(json.dumps(results, indent=1))
            print(side, name, seed, done[str(seed)], flush=True)


def table(runs: Path) -> Iterator[str]:
    """A line a task: mean and standard deviation over the seeds (how many) of every side, x 100,
    and the median time of our runs."""
    found = {
        side: json.loads(path.read_text())
        for side in SIDES
        if (path := runs / f"results.{side}.json").exists()
    }
    yield f"| task | score | epochs | {' | '.join(found)} | ours - plain | minutes |"
    yield "| --- " * (len(found) + 5) + "|"
    for name, recipe in RECIPES.items():
        means, cells = {}, []
        for side, results in found.items():
            runs_of = list(results.get(name, {}).values())
            scores = [100 * one["score"] for one in runs_of]
            means[side] = statistics.mean(scores) if scores else np.nan
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{means[side]:.1f}{spread} ({len(scores)})" if scores else "")
        difference = means.get("ours", np.nan) - means.get("plain", np.nan)
        minutes = [one["minutes"] for one in found.get("ours", {}).get(name, {}).values()]
        usual = f"{statistics.median(minutes):.1f}" if minutes else ""
        yield (
            f"| {name} | {recipe.score} | {recipe.epochs} | {' | '.join(cells)} "
            f"| {difference:+.1f} | {usual} |"
        )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("sources", type=Path)
    data.add_argument("runs", type=Path)
    train = commands.add_parser("run")
    train.add_argument("runs", type=Path)
    train.add_argument("model", type=Path)
    train.add_argument("side", choices=SIDES)
    train.add_argument("tasks", nargs="*", default=list(RECIPES), choices=[[], *RECIPES])
    train.add_argument("--seeds", type=int, default=3)
    show = commands.add_parser("table")
    show.add_argument("runs", type=Path)
    given = parser.parse_args()
    if given.command == "data":
        write_data(given.sources, given.runs / "data")
    elif given.command == "run":
        run(given.runs, given.model, given.side, given.tasks, given.seeds)
    else:
        print(*table(given.runs), sep="\n")


if __name__ == "__main__":
    main()
