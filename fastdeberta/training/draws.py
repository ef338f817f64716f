"""What is random in a step: the numbers of each of its rows, and torch's seed.

Rows' numbers do not depend on how many processes and micro-batches share the step.
"""

import torch
from torch import Tensor

from .order import mix


class Draws:
    """The random numbers of one step, by row of its global batch.

    Args:
        seed, step: whose numbers. first, count: rows first .. first + count - 1 of the `total`
            rows of the step are this micro-batch's.
    """

    def __init__(self, seed: int, step: int, first: int, count: int, total: int):
        self.seed, self.step = seed, step
        self.first, self.count, self.total = first, count, total
        self._calls = 0

    def uniform(self, *shape: int) -> Tensor:
        """float32 [count, *shape] in [0, 1); every call has numbers of its own.

        A row's numbers are the same in whatever micro-batch it stands. A longer first dimension
        of `shape` appends numbers and changes none, so that they do not depend on padding either.
        """
        generator = torch.Generator().manual_seed(mixed(self.seed, self.step, self._calls))
        self._calls += 1
        # Rows last: the generator fills in order, and padding comes behind all that is real.
        numbers = torch.rand(*shape, self.total, generator=generator)
        return numbers[..., self.first : self.first + self.count].movedim(-1, 0).contiguous()


def mixed(*numbers: int) -> int:
    """A seed from several numbers, all of which matter to its lower 32 bits: torch's CPU generator
    looks at those alone."""
    return int(mix(*numbers)) >> 1  # manual_seed takes a signed number.


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seeds torch for one step of one rank."""
    torch.manual_seed(mixed(seed, step, rank))
