"""The Triton kernels beyond the calls that every backend is tested on: shipped tiles, groups of
heads and of query tiles, what the launcher promises. Interpreted where there is no GPU."""

import json
from dataclasses import asdict, replace

import cases
import numpy as np
import pytest
import torch
from cases import CASES, LINEAR, LOG, V1, V3, Case, by_op, make, truth_and_peer
from closeness import assert_close

from fastdeberta import RelativePosition, available_backends, disentangled_attention
from fastdeberta.dropout import keep_mask

if available_backends()["triton"] is not None:
    pytest.skip(f"triton: {available_backends()['triton']}", allow_module_level=True)

import triton
import triton.language as tl
from conftest import INTERPRETED

from fastdeberta.backends.triton import configs, launch, tiles
from fastdeberta.backends.triton.configs import Config, Launch

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.interpreted if INTERPRETED else pytest.mark.gpu
# float32 against float64, on normal inputs.
ERROR = 2e-6

# Neighbouring distances up to seven rows apart.
JUMPS = RelativePosition(span=16, buckets=16, max_distance=10)
NARROW = RelativePosition(span=1, buckets=None)

SMALL = Config(16, 16, 16, 32, Launch(4, 1))
by_id = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _poison():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    ours = by_op(disentangled_attention, make(case, dtype, DEVICE), "triton")
    truth, peer = truth_and_peer(case, dtype, DEVICE)
    assert_close(ours, peer, truth, dtype)


@pytest.fixture
def use(monkeypatch):
    """use(config) takes it for every call."""

    def choose(config: Config) -> None:
        monkeypatch.setattr(configs, "choose", lambda *_: config)

    return choose


def record(monkeypatch) -> list[tuple[str, dict]]:
    """Names and arguments of what is launched from now on."""
    launched = []
    original = launch.launch

    def noting(kernel, grid, how, values):
        launched.append((kernel.__name__, values))
        original(kernel, grid, how, values)

    monkeypatch.setattr(launch, "launch", noting)
    return launched


@pytest.mark.parametrize(
    "case_id", ["length-65", "causal-right", "holes-uniform", "packed-causal", "dropout", "linear"]
)
def test_small_tiles(case_id, use):
    use(SMALL)
    check(by_id["linear-longer-than-span" if case_id == "linear" else case_id])


@pytest.mark.parametrize(
    ("size", "far", "case"),
    [
        (64, False, Case("short", (100, 130), heads=1, head_dim=64, position=V3, mask="right")),
        (64, True, Case("long", (200,), heads=1, head_dim=64, dropout_p=0.1)),
        (128, True, Case("wide", (150,), heads=1, head_dim=100, position=LINEAR)),
        (256, True, Case("widest", (70,), heads=1, head_dim=256)),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_shipped_tiles(size, far, case, use, monkeypatch):
    dtype = torch.bfloat16
    forward, backward = (
        configs._default("sm_90", backward, size, False, far) for backward in (False, True)
    )
    monkeypatch.setattr(
        configs, "choose", lambda family, is_backward, *_: backward if is_backward else forward
    )
    check(case, dtype)


ODD = (
    Case("jumps", (40,), heads=1, position=JUMPS),
    Case("narrow", (70,), heads=1, head_dim=8, position=NARROW),
    Case("far-on-the-left-only", (90,), heads=1, head_dim=8, causal=True),
    Case("v1-far", (600,), heads=1, head_dim=8, position=V1),
)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_positions(case):
    check(case)


@pytest.mark.parametrize("workspace", [1, 60_000, 150_000], ids=["tile", "tiles", "heads"])
@pytest.mark.parametrize(
    "case",
    [
        Case("padded", (127, 30, 90), heads=2, head_dim=16, mask="right", padded_rows="uniform"),
        Case("packed", (0, 127, 33), heads=2, head_dim=16, packed=True, causal=True),
        Case("near", (100, 100), heads=2, head_dim=16, position=V3, dropout_p=0.2),
    ],
    ids=str,
)
def test_groups(case, workspace, monkeypatch):
    """Heads, and query tiles of one head, in as many groups as a small workspace makes of them."""
    monkeypatch.setattr(launch, "workspace_bytes", lambda device: workspace)
    launched = record(monkeypatch)
    check(case)
    assert sum(name == "forward_kernel" for name, _ in launched) > 1


def test_fp32_is_as_exact_as_promised():
    for case_id in ("length-127", "v3", "packed-holes"):
        case = by_id[case_id]
        ours = by_op(disentangled_attention, make(case, torch.float32, DEVICE), "triton")
        truth, _ = truth_and_peer(case, torch.float32, DEVICE)
        for name in ("out", "lse"):
            same = torch.where(truth[name].isinf() & (ours[name] == truth[name]), 0, 1).bool()
            assert (ours[name].double() - truth[name])[same].abs().max() <= ERROR


@pytest.mark.parametrize("table", [3, 4], ids=["pos_key", "pos_query"])
def test_an_off_by_one_row_is_seen(table):
    case = by_id["length-65"]
    call = make(case, torch.float32, DEVICE)
    tensors = [x.roll(1, 0) if n == table else x for n, x in enumerate(call.tensors)]
    wrong = cases.Call(tuple(tensors), call.dout, call.options, call.defined)
    truth, peer = truth_and_peer(case, torch.float32, DEVICE)
    with pytest.raises(AssertionError, match="out: max error"):
        assert_close(by_op(disentangled_attention, wrong, "triton"), peer, truth, torch.float32)


@triton.jit
def keep_kernel(
    rng_state, keep, stream, i0, j0, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    found = tiles.keep_tile(rng_state, stream, i0, j0, threshold, ROWS, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(keep + place, found.to(tl.int8))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (32, 16)])
def test_dropout_keeps_the_bits_of_the_rule(rows, columns, dropout_p):
    rng_state = torch.tensor([2**61 + 12345, 7], device=DEVICE)
    sequences, heads = 2, 3
    every = keep_mask(rng_state, sequences, heads, 64, 64, dropout_p)
    for sequence, head, i0, j0 in [(0, 0, 0, 0), (1, 2, 32, 32), (0, 1, 16, 48 - columns)]:
        keep = torch.empty(rows, columns, dtype=torch.int8, device=DEVICE)
        keep_kernel[(1,)](
            rng_state,
            keep,
            sequence * heads + head,
            i0,
            j0,
            int(dropout_p * 2**32),
            ROWS=rows,
            COLUMNS=columns,
        )
        expected = every[sequence, head, i0 : i0 + rows, j0 : j0 + columns]
        assert torch.equal(keep.bool(), expected)


def test_two_runs_give_the_same_bits():
    case = by_id["dropout-packed"]
    first, second = (
        by_op(disentangled_attention, make(case, torch.float32, DEVICE), "triton") for _ in "12"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


# The launcher


@pytest.mark.parametrize("max_seqlen", [1, 16, 65, 512, 2000])
@pytest.mark.parametrize("rule", [LOG, V1, V3, NARROW], ids=["log", "v1", "v3", "narrow"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("workspace", [2**10, 2**20, 2**25])
def test_plans_cover_every_tile_once(max_seqlen, rule, causal, workspace):
    _, first, last = rule.table()
    config = replace(SMALL, block=32)
    sequences = 6
    made = launch.plan(sequences, max_seqlen, first, last, causal, config, 2048, workspace)
    n = -(-max_seqlen // 32)
    assert made.tiles == n
    covered = np.zeros((sequences, n), int)
    for group in made.groups:
        assert group.tiles <= made.group_tiles
        covered[
            group.first : group.first + group.size, group.tile0 : group.tile0 + group.tiles
        ] += 1
        assert group.size * made.both * 2048 <= workspace or group.size == made.group_tiles == 1
    assert (covered == 1).all()
    # What tiles are near, from the distances themselves.
    position = torch.arange(n * 32)
    distance = (position[:, None] - position[None, :]).view(n, 32, n, 32)
    lowest, highest = distance.amin((1, 3)), distance.amax((1, 3))
    near = (lowest < last) & (highest > first)
    assert near.sum(1).max() <= made.slots
    assert made.far >= bool((~near).tril().any() if causal else (~near).any())
    assert made.reach % config.columns == 0


@pytest.mark.parametrize(("rule", "length"), [(V3, 4096), (V3, 65536), (V1, 16384)])
def test_workspace_does_not_grow_with_length(rule, length):
    _, first, last = rule.table()
    config = configs._default("sm_90", True, 64, False, True)
    made = launch.plan(24, length, first, last, False, config, 64 * 64 * 2, 2**25)
    assert max(group.size for group in made.groups) * made.both * 64 * 64 * 2 <= 2**25
    assert made.reach <= 1024


def test_too_little_shared_memory_takes_smaller_tiles(monkeypatch):
    monkeypatch.setattr(launch, "_SHRUNK", {})
    seen = []

    def run(config):
        seen.append(config)
        if config.block > 16:
            raise launch.OutOfResources(200_000, 100_000, "shared memory")
        return config.block

    device = torch.device(DEVICE)
    start = Config(64, 32, 64, 128, Launch(4, 2))
    assert launch._fitting(device, False, start, run) == 16
    assert [c.block for c in seen] == [64, 64, 32, 16] and seen[1].forward.stages == 1
    seen.clear()
    assert launch._fitting(device, False, start, run) == 16
    assert [c.block for c in seen] == [16], "what fits is remembered"
    with pytest.raises(launch.OutOfResources):
        launch._fitting(device, True, start, lambda config: run(replace(config, block=64)))


def test_profile_takes_the_place_of_the_table(tmp_path, monkeypatch):
    file = tmp_path / "profile.json"
    key = configs.key(False, 32, torch.float32, True)
    file.write_text(json.dumps({"configs": {key: asdict(SMALL)}}))
    monkeypatch.setenv("FASTDEBERTA_TRITON_PROFILE", str(file))
    launched = record(monkeypatch)
    check(by_id["length-65"])
    blocks = {v["BLOCK"] for name, v in launched if name in ("forward_kernel", "dq_kernel")}
    assert blocks == {16, 32}, "the backward pass has no entry"


@pytest.mark.parametrize("text", [None, "{", '{"configs": {"a": {"block": 1, "what": 2}}}'])
def test_a_broken_profile_is_named(text, tmp_path, monkeypatch):
    file = tmp_path / "profile.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("FASTDEBERTA_TRITON_PROFILE", str(file))
    with pytest.raises(ValueError, match="FASTDEBERTA_TRITON_PROFILE must name a file .*profile"):
        configs.choose("sm_90", False, 64, torch.bfloat16, False)


def test_refusals():
    def call(dim=16, dtype=torch.float32, **options):
        inputs = cases.random_call(5, dtype=dtype, device=DEVICE, dim=dim)
        return disentangled_attention(*inputs, relative_position=LOG, backend="triton", **options)

    with pytest.raises(ValueError, match="head dims up to 256, not 257"):
        call(dim=257)
    with pytest.raises(ValueError, match="float16, bfloat16 and float32, not torch.float64"):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match="softmax_scale above 0, not -1"):
        call(softmax_scale=-1.0)
    assert call(dim=256).isfinite().all()
