"""Shapes of the benchmarks, named after the models they come from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A batch of sequences for one layer of a model."""

    model: str
    batch: int
    length: int
    heads: int = 12
    head_dim: int = 64

    @property
    def id(self) -> str:
        return f"{self.model}-{self.batch}x{self.length}"


SHAPES = [
    Shape("v3-base", 1, 128),
    Shape("v3-base", 8, 128),
    Shape("v3-base", 1, 512),
    Shape("v3-base", 4, 512),
    Shape("v3-base", 1, 1024),
]
