from functools import partial

import definition
import numpy as np
import pytest
import torch
from cases import LOG, attend, random_call, seed_dropout

from fastdeberta import disentangled_attention
from fastdeberta.dropout import keep_mask, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that the generator's authors publish with Random123."""
    seed = torch.from_numpy(np.array(key, dtype="<u4").view(np.int64))[0]
    words = philox(tuple(torch.tensor(c) for c in counter), seed)
    assert tuple(int(word) for word in words) == expected
    theirs = definition.philox(np.array(counter, dtype=np.uint32), key)
    assert tuple(int(word) for word in theirs) == expected


@pytest.mark.parametrize("state", [(0, 0), (12345678901234567, 3), (2**62 - 1, 2**40 + 5)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 17), (3, 2, 65, 65)])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_keep_mask_equals_numpy(state, shape, dropout_p):
    sequences, heads, length, _ = shape
    ours = keep_mask(torch.tensor(state), *shape, dropout_p)
    assert torch.equal(ours, definition.keep_mask(*state, sequences, heads, length, dropout_p))


def test_keep_mask_of_a_part_is_a_part_of_the_mask():
    state = torch.tensor([99, 0])
    whole = keep_mask(state, 3, 2, 65, 70, 0.3)
    assert torch.equal(keep_mask(state, 2, 2, 20, 33, 0.3), whole[:2, :, :20, :33])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_op_drops_what_the_rule_says(packed, backend, device):
    lengths, length, dropout_p = (37, 0, 53), 53, 0.3
    query, key, _, *tables = random_call(length, 3, device=device, dim=16)
    identity = torch.eye(length, device=device)[:, None].expand(-1, 2, -1)  # [L, H, L]
    mask = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
    options = {"key_mask": mask}
    if packed:
        query, key = query[mask], key[mask]
        cu_seqlens = torch.tensor([0, 37, 37, 90], dtype=torch.int32, device=device)
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": length}
    columns = []
    for start in range(0, length, 16):  # As many columns of the probabilities as a head is wide.
        value = identity[..., start : start + 16]
        value = torch.nn.functional.pad(value, (0, 16 - value.size(-1)))
        value = value.expand(3, -1, -1, -1)
        seed = seed_dropout(device)
        out = attend(
            query,
            key,
            value[mask] if packed else value,
            *tables,
            relative_position=LOG,
            dropout_p=dropout_p,
            backend=backend,
            **options,
        )
        columns.append(out if packed else out[mask])
    dropped = torch.cat(columns, -1)[..., :length] == 0  # [T, H, L]
    expected = keep_mask(torch.tensor([seed, 0]), 3, 2, length, length, dropout_p)
    expected = expected.to(device) & mask[:, None, None, :]
    assert torch.equal(~dropped, expected.transpose(1, 2)[mask])


def test_dropout_follows_manual_seed(backend, device):
    inputs = random_call(16, device=device, dim=16)
    call = partial(attend, *inputs, relative_position=LOG, dropout_p=0.5, backend=backend)
    torch.manual_seed(11)
    first, second = call(), call()
    torch.manual_seed(11)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.02, 0.1, 0.5, 0.9])
def test_keep_rate(dropout_p):
    keep = keep_mask(torch.tensor([2024, 0]), 4, 4, 256, 256, dropout_p).double()
    sigma = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(keep.mean() - (1 - dropout_p)) < 4 * sigma / keep.numel() ** 0.5
    for dims in [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        means = keep.mean(dims)
        count = keep.numel() / means.numel()
        assert (means - (1 - dropout_p)).abs().max() < 5 * sigma / count**0.5


def test_no_dropout_draws_no_random_number():
    inputs = random_call()
    state = torch.get_rng_state()
    disentangled_attention(*inputs, relative_position=LOG)
    assert torch.equal(torch.get_rng_state(), state)
