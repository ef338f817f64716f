"""The order of the data: random, a pure function of (seed, epoch, index), nothing in memory."""

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 12
_FEW = 1 << 10


def mix(*words: np.ndarray | int) -> np.ndarray:
    """64 bits that look random, of integers that broadcast together: uint64.

    Source: the output function of SplitMix64, once for every word.
    """
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*words: np.ndarray | int) -> np.ndarray:
    """float64 in [0, 1), of integers; see `mix`."""
    return (mix(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Where a random permutation of 0 .. count - 1 takes each index: int64.

    A Feistel network permutes the least power of two that holds `count`; what it takes to `count`
    or beyond goes through it again, until it is below (cycle walking). Its halves would be too
    narrow for a few indices: random numbers sort those.
    """
    if count <= _FEW:
        return np.argsort(mix(*key, np.arange(count)), kind="stable")[index]
    bits = (count - 1).bit_length()
    widths = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    masks = [(np.uint64(1) << width) - np.uint64(1) for width in widths]
    keys = mix(*key, np.arange(_ROUNDS))

    def network(x: np.ndarray) -> np.ndarray:
        halves = [x >> widths[1], x & masks[1]]
        for number, round_key in enumerate(keys):
            side = number % 2
            halves[side] = halves[side] ^ (mix(round_key ^ halves[1 - side]) & masks[side])
        return (halves[0] << widths[1]) | halves[1]

    x = network(index.astype(np.uint64))
    while (outside := x >= np.uint64(count)).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def epoch_rows(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Row numbers of step `step` when `count` rows are shuffled anew for every epoch: int64.

    Steps take rows one after another, so that every epoch has every row once; a batch may hold the
    end of one epoch and the beginning of the next. Nothing but the step says where the data stands.
    """
    position = step * batch_size + np.arange(batch_size)
    epoch, index = position // count, position % count
    rows = np.empty(batch_size, np.int64)
    for number in np.unique(epoch):
        own = epoch == number
        rows[own] = permute(index[own], count, seed, int(number))
    return torch.from_numpy(rows)
