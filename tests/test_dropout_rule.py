"""Every implementation of the dropout rule against Philox as its paper has it, score by score."""

import json

import numpy as np
import pytest
import torch

from fastdeberta.dropout import keep_mask
from fastdeberta.libraries import load

# Counter, key, output: from Random123's own known-answer tests of philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): uint32 [..., 4], (k0, k1) -> [..., 4]."""
    r0, l0, r1, l1 = (np.asarray(counter[..., n], dtype=np.uint64) for n in (0, 1, 2, 3))
    low = np.uint64(0xFFFFFFFF)
    for turn in range(10):
        k0 = np.uint64((key[0] + turn * 0x9E3779B9) % 2**32)
        k1 = np.uint64((key[1] + turn * 0xBB67AE85) % 2**32)
        m0, m1 = r0 * np.uint64(0xD2511F53), r1 * np.uint64(0xCD9E8D57)
        r0, l0 = (m1 >> np.uint64(32)) ^ l0 ^ k0, m1 & low
        r1, l1 = (m0 >> np.uint64(32)) ^ l1 ^ k1, m0 & low
    return np.stack([r0, l0, r1, l1], axis=-1)


def words(seed, offset, sequences, heads, query_len, key_len):
    """The random word of every score, one draw a score: [sequences, heads, query_len, key_len]."""
    s, h, i, j = np.ogrid[:sequences, :heads, :query_len, :key_len]
    row, stream = (i & 7) | ((i >> 4) << 3), s * heads + h
    counter = np.stack(np.broadcast_arrays(j >> 1, row, stream, offset & 0xFFFFFFFF), axis=-1)
    drawn = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    index = np.broadcast_to(2 * ((i >> 3) & 1) + (j & 1), drawn.shape[:-1])
    return np.take_along_axis(drawn, index[..., None], axis=-1)[..., 0]


@pytest.fixture
def compiled():
    """The compiled library's operators."""
    if reason := load("_C"):
        pytest.skip(reason)
    return torch.ops.fastdeberta_C


@pytest.fixture(params=["python", "compiled"])
def keep(request):
    if request.param == "python":
        return keep_mask
    return request.getfixturevalue("compiled").dropout_keep


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, output):
    counter, key, output = (
        np.array([int(word, 16) for word in text.split()]) for text in (counter, key, output)
    )
    assert philox(counter, [int(k) for k in key]).tolist() == output.tolist()


def test_each_word_is_the_published_one_to_the_last_bit(keep):
    """Seed, offset and position 0 are the all-zero counter and key; a threshold finds each word."""
    state = torch.zeros(2, dtype=torch.int64)
    for n, word in enumerate(KNOWN_ANSWERS[0][2].split()):
        i, j = 8 * (n // 2), n % 2
        assert keep(state, 1, 1, 16, 2, int(word, 16) / 2**32)[0, 0, i, j]
        assert not keep(state, 1, 1, 16, 2, (int(word, 16) + 1) / 2**32)[0, 0, i, j]


@pytest.mark.parametrize("seed, offset", [(0, 0), (42, 1), (2**63 - 1, 2**32 + 5), (-1, -1)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 5), (1, 2, 9, 64), (3, 1, 130, 33)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.999])
def test_mask_follows_the_rule_bit_for_bit(keep, seed, offset, shape, dropout_p):
    mask = keep(torch.tensor([seed, offset]), *shape, dropout_p)
    expected = words(seed, offset, *shape) >= int(dropout_p * 2**32)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (1, 2, 0, 4), (1, 2, 4, 0)])
def test_empty_shapes(keep, shape):
    assert keep(torch.tensor([1, 2]), *shape, 0.1).shape == shape


@pytest.mark.parametrize("dropout_p", [0.05, 0.1, 0.5])
def test_keep_rate(keep, dropout_p):
    """Within 5 standard deviations: overall, and in each of the four words of a draw."""
    mask = keep(torch.tensor([7, 0]), 4, 4, 256, 256, dropout_p).double()
    by_word = mask.view(-1, 2, 8, 128, 2).mean(dim=(0, 2, 3))
    deviation = (dropout_p * (1 - dropout_p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - (1 - dropout_p)) < 5 * deviation
    assert (by_word - (1 - dropout_p)).abs().max() < 5 * 2 * deviation


@pytest.mark.parametrize("other", [(8, 0), (7, 1), (7 + 2**32, 0)], ids=["seed", "offset", "high"])
def test_masks_of_different_states_are_independent(keep, other):
    """Two independent masks agree in p^2 + (1 - p)^2 of the scores."""
    first, second = (keep(torch.tensor(state), 2, 4, 256, 256, 0.3) for state in [(7, 0), other])
    agreement = (first == second).double().mean()
    deviation = (0.58 * 0.42 / first.numel()) ** 0.5
    assert abs(agreement - 0.58) < 5 * deviation


def test_threads_do_not_change_the_mask(keep):
    arguments = torch.tensor([3, 4]), 2, 3, 250, 129, 0.2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = keep(*arguments)
        torch.set_num_threads(4)
        assert torch.equal(alone, keep(*arguments))
    finally:
        torch.set_num_threads(threads)


def test_build_info_is_json(compiled):
    info = json.loads(compiled.build_info())
    assert info["torch_target"] == "2.10"
    assert info["cxx_standard"] >= 201703
    assert {"compiler", "torch_built_with", "openmp", "cpu_features"} <= info.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rng_state": torch.zeros(3, dtype=torch.int64)}, "rng_state must be"),
        ({"rng_state": torch.zeros(2)}, "rng_state must be"),
        ({"heads": -1}, "must not be negative"),
        ({"dropout_p": 1.0}, r"dropout_p must lie in \[0, 1\)"),
    ],
    ids=["rng_state-size", "rng_state-dtype", "heads", "dropout_p"],
)
def test_bad_arguments_are_named(compiled, change, message):
    state = torch.zeros(2, dtype=torch.int64)
    sizes = {"sequences": 1, "heads": 1, "query_len": 4, "key_len": 4}
    with pytest.raises(RuntimeError, match=message):
        compiled.dropout_keep(**({"rng_state": state, "dropout_p": 0.1} | sizes | change))
