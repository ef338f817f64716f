"""Shapes of the benchmarks, named after the models they come from, and dtypes of each device."""

from dataclasses import dataclass

import torch

from fastdeberta import RelativePosition

# DeBERTaV3's positions.
RULE = RelativePosition()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A batch of sequences for one layer of a model."""

    batch: int
    length: int
    model: str = "v3-base"
    heads: int = 12
    head_dim: int = 64

    @property
    def id(self) -> str:
        return f"{self.batch}x{self.length}"


SHAPES = [
    Shape(1, 32),
    Shape(1, 128),
    Shape(8, 128),
    Shape(1, 512),
    Shape(4, 512),
    Shape(1, 1024),
]
LONG_SHAPES = [Shape(1, 2048), Shape(1, 4096)]

GPU_SHAPES = [
    Shape(4, 512),
    Shape(8, 128),
    Shape(1, 128),
    Shape(16, 256),
    Shape(2, 2048),
    Shape(1, 8192),
]


def dtypes(device: str) -> list[str]:
    """What every benchmark runs in: on a GPU what models run in there."""
    return ["fp32", "bf16"] if device == "cpu" else ["bf16"]


def pace(device: str, **cpu: float) -> dict[str, float]:
    """How long `interleaved` takes for a case: as given on a CPU; on a GPU always the same."""
    return cpu if device == "cpu" else {"seconds": 0.3, "least": 3, "turn": 0.01}
