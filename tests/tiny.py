"""Tiny models and texts, for the tests of everything above attention."""

import random
from functools import cache
from typing import Any

import torch
from torch import nn

from fastdeberta import tokenizer as tokenizers
from fastdeberta.models import Config

# Sizes small enough for a test, and positions that saturate within a sequence of 41 tokens.
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEBERTA: dict[str, Any] = SIZES | {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "max_relative_positions": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "legacy": False,
}
DEBERTA_V1: dict[str, Any] = SIZES | {
    "model_type": "deberta",
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "legacy": False,
}
ELECTRA: dict[str, Any] = SIZES | {
    "model_type": "electra",
    "embedding_size": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
FAMILIES = {"deberta": DEBERTA_V1, "deberta-v2": DEBERTA, "electra": ELECTRA}


def config(family: str = "deberta-v2", **changes: Any) -> Config:
    return Config.from_dict({**FAMILIES[family], **changes})


def randomize(model: nn.Module, std: float = 0.25) -> nn.Module:
    """Weights so wide that attention and its position terms matter, and all of them different."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1)
    return model.eval()


def token_ids(*shape: int, vocab: int = SIZES["vocab_size"]) -> torch.Tensor:
    """Random ids without the first five, which are special."""
    return torch.randint(5, vocab, shape, generator=torch.Generator().manual_seed(1))


_TOPICS = {
    "forest": ("oak birch moss fern path", "deer fox owl hare bear", "walks hides sleeps grazes"),
    "sea": (
        "wave reef tide shell coast",
        "crab whale seal gull squid",
        "swims dives floats drifts",
    ),
}
_SENTENCE = "The {} {} {} near the {}, and the {} {} by the old {}."


@cache
def labelled(count: int, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """Pairs of a short text and its topic, which its words give away."""
    draw = random.Random(seed)

    def sentence(topic: str) -> str:
        places, animals, verbs = (words.split() for words in _TOPICS[topic])
        size = draw.choice(["small", "big", "young", "grey"])
        kinds = (animals, verbs, places, animals, verbs, places)
        return _SENTENCE.format(size, *(draw.choice(words) for words in kinds))

    topics = [draw.choice(sorted(_TOPICS)) for _ in range(count)]
    return tuple((" ".join(sentence(t) for _ in range(draw.randint(1, 3))), t) for t in topics)


def documents(count: int = 120) -> list[str]:
    return [document for document, _ in labelled(count)]


@cache
def tokenizer():
    return tokenizers.train(documents(), 120)
