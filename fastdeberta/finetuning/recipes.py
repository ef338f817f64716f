"""Recipes: settings that go by the model's family and size, and rates that go by depth."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..models import Config, Model
from ..models.encoder import initialize
from ..training.optimizer import parameter_groups

# (hidden size, layers) -> a name and its settings.
_Sizes = Mapping[tuple[int, int], tuple[str, dict[str, Any]]]

_ELECTRA = {"weight_decay": 0.0, "warmup_fraction": 0.1, "batch_size": 32, "dropout": 0.1}
# arXiv 2003.10555, appendix B.
ELECTRA: _Sizes = {
    (256, 12): ("small", _ELECTRA | {"learning_rate": 3e-4, "layer_decay": 0.8}),
    (768, 12): ("base", _ELECTRA | {"learning_rate": 1e-4, "layer_decay": 0.8}),
    (1024, 24): ("large", _ELECTRA | {"learning_rate": 5e-5, "layer_decay": 0.9}),
}

# The released MNLI scripts: 1,000 (v3-large: 500) steps of warm-up in 18,400 (12,300) are 5 %.
_DEBERTA = {"weight_decay": 0.01, "warmup_fraction": 0.05, "batch_size": 64, "layer_decay": 1.0}
V1: _Sizes = {
    (768, 12): ("v1-base", _DEBERTA | {"learning_rate": 3e-5, "dropout": 0.1}),
    (1024, 24): ("v1-large", _DEBERTA | {"learning_rate": 1e-5, "dropout": 0.2}),
    (1024, 48): ("v1-xlarge", _DEBERTA | {"learning_rate": 5e-6, "dropout": 0.3}),
}
V2: _Sizes = {
    (1536, 24): ("v2-xlarge", _DEBERTA | {"learning_rate": 4e-6, "dropout": 0.25}),
    (1536, 48): ("v2-xxlarge", _DEBERTA | {"learning_rate": 3e-6, "dropout": 0.3}),
}
V3: _Sizes = {
    (384, 12): ("v3-xsmall", _DEBERTA | {"learning_rate": 4.5e-5, "dropout": 0.1}),
    (768, 6): ("v3-small", _DEBERTA | {"learning_rate": 4.5e-5, "dropout": 0.2}),
    (768, 12): ("v3-base", _DEBERTA | {"learning_rate": 1.5e-5, "dropout": 0.1}),
    (1024, 24): ("v3-large", _DEBERTA | {"learning_rate": 7e-6, "dropout": 0.3}),
}


def recipe(config: Config) -> tuple[str, dict[str, Any]]:
    """The released size of a model's family that is nearest in parameters of its layers, by name,
    and that size's learning_rate, layer_decay, dropout (of the task layer), weight_decay,
    warmup_fraction and batch_size.

    Source: ELECTRA, appendix B; microsoft/DeBERTa's scripts for MNLI.
    """
    if config.model_type == "electra":
        family, sizes = "electra-", ELECTRA
    elif config.model_type == "deberta":
        family, sizes = "deberta-", V1
    else:
        family, sizes = "deberta-", V2 if config.conv_kernel_size > 0 else V3
    own = _log_parameters(config.hidden_size, config.num_hidden_layers)
    name, values = sizes[min(sizes, key=lambda size: abs(_log_parameters(*size) - own))]
    return family + name, dict(values)


def _log_parameters(hidden: int, layers: int) -> float:
    return math.log(hidden * hidden * layers)


def layer_groups(
    model: Model, learning_rate: float, weight_decay: float, decay: float, quirk: bool = False
) -> list[dict[str, Any]]:
    """Optimiser groups, a pair for each depth: the head has the learning rate itself, the top
    layer's is `decay` times it, and every layer's is `decay` times that of the one above it.

    What all layers stand on (embeddings, relative table, convolution) comes below the first. With
    quirk the top layer already has decay ** 2, and all below it one power more, as in
    google-research/electra, which counts the head's depth two above the top layer's.
    """
    layers = model.config.num_hidden_layers
    depths: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        depths.setdefault(_depth(name, layers), []).append(parameter)
    groups = []
    for depth, parameters in sorted(depths.items()):
        power = depth + (quirk and depth > 0)
        groups += parameter_groups(parameters, learning_rate * decay**power, weight_decay)
    return groups


def _depth(name: str, layers: int) -> int:
    """0 for the head, 1 for the top layer, layers + 1 for the embeddings."""
    if name.startswith("head."):
        return 0
    if ".encoder.layer." in name:
        return layers - int(name.split(".encoder.layer.")[1].split(".")[0])
    return layers + 1


def reinitialize(model: Model, layers: int) -> None:
    """Gives the top `layers` layers random weights; the lower ones and the tables stay.

    Raises:
        ValueError: more layers than the model has.
    """
    stack = model.backbone.encoder.layer
    if layers > len(stack):
        raise ValueError(f"reinit_layers must be at most the model's {len(stack)}, got {layers}")
    for layer in stack[len(stack) - layers :]:
        initialize(layer, model.config.initializer_range)
