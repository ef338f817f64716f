"""Which attention probabilities dropout keeps: one counter-based rule for every backend.

Philox4x32-10 (Salmon et al. 2011) turns (seed, offset; sequence, head, i, j) into bits, so that a
backward pass, or another backend, finds the same mask again without storing it. One draw of four
words serves rows i, i + 8 and columns j, j + 1 (j even): the four scores that one thread holds of
an m16n8 tensor-core tile.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (int64 tensors) for each counter.

    Args:
        counter: four int64 tensors, broadcastable to one shape, values in [0, 2**32).
        seed: int64 scalar tensor; its two halves are the key.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # An int64 product wraps modulo 2**64: its bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    rng_state: Tensor, sequences: int, heads: int, query_len: int, key_len: int, dropout_p: float
) -> Tensor:
    """The probabilities that dropout keeps.

    Args:
        rng_state: int64 [2]: seed and offset, on the device of the result.
        dropout_p: probability of dropping, in [0, 1).

    Returns:
        bool [sequences, heads, query_len, key_len], True = keep.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1] & _WORD
    rows, columns = -(-query_len // 16), -(-key_len // 2)
    stream = torch.arange(sequences * heads, device=device).view(-1, 1, 1)
    words = philox(
        (
            torch.arange(columns, device=device).view(1, 1, -1),
            torch.arange(rows * 8, device=device).view(1, -1, 1),
            stream,
            offset,
        ),
        seed,
    )
    # [stream, row block, 8 rows, column pair] x 4 words -> [stream, block, half, 8, pair, parity]
    grid = torch.stack(words, -1).view(sequences * heads, rows, 8, columns, 2, 2)
    grid = grid.permute(0, 1, 4, 2, 3, 5).reshape(sequences, heads, rows * 16, columns * 2)
    return grid[..., :query_len, :key_len] >= int(dropout_p * 2**32)
