from types import SimpleNamespace

import definition
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DebertaConfig, DebertaV2Config, ElectraConfig
from transformers.models.deberta.modeling_deberta import (
    build_relative_position as build_linear_position,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    build_relative_position,
    make_log_bucket_position,
)

from fastdeberta import RelativePosition

LOGARITHMIC = (
    RelativePosition(256, 256, 512),
    RelativePosition(32, 32, 64),
    RelativePosition(8, 8, 16),
    RelativePosition(4, 4, 5),
    RelativePosition(4, 4, 3000),
    RelativePosition(6, 6, 5),
    RelativePosition(10, 10, 1000),
    RelativePosition(48, 48, 512),
    RelativePosition(256, 256, 4096),
    RelativePosition(512, 512, 512),
)
LINEAR = tuple(RelativePosition(span, None) for span in (1, 2, 7, 512))
CLIPPED = tuple(
    RelativePosition(r.span, r.buckets, r.max_distance, clip_distance=True) for r in LOGARITHMIC
)


def distances(reach: int = 5000) -> torch.Tensor:
    return torch.arange(-reach, reach + 1)


def transformers_row(bucket: torch.Tensor, span: int) -> torch.Tensor:
    return (bucket.long() + span).clamp(0, 2 * span - 1)


@pytest.mark.parametrize("rule", LOGARITHMIC, ids=str)
def test_log_buckets_are_those_of_transformers(rule):
    expected = make_log_bucket_position(distances(), rule.buckets, rule.max_distance).long()
    assert torch.equal(rule.bucket(distances()), expected)
    assert torch.equal(rule.row(distances()), transformers_row(expected, rule.span))


@pytest.mark.parametrize("length", [1, 2, 130, 1100])
def test_matrix_is_that_of_transformers(length):
    states = torch.empty(1, length, 1)
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    assert torch.equal(
        RelativePosition().bucket(distance), build_relative_position(states, states, 256, 512)[0]
    )
    linear = RelativePosition(512, None)
    assert torch.equal(linear.bucket(distance), build_linear_position(states, states)[0])


@pytest.mark.parametrize("rule", LINEAR, ids=str)
def test_linear_positions_are_clamped_distances(rule):
    expected = [max(0, min(2 * rule.span - 1, x + rule.span)) for x in distances().tolist()]
    assert rule.row(distances()).tolist() == expected


@pytest.mark.parametrize("rule", (*LOGARITHMIC, *CLIPPED, *LINEAR), ids=str)
def test_definition_has_the_same_rows(rule):
    expected = [
        definition.row(x, rule.span, rule.buckets, rule.max_distance, rule.clip_distance)
        for x in distances(1500).tolist()
    ]
    assert rule.row(distances(1500)).tolist() == expected


@pytest.mark.parametrize("rule", (*LOGARITHMIC, *CLIPPED, *LINEAR), ids=str)
def test_table_looks_up_every_distance(rule):
    table = rule.table()
    assert torch.equal(table.lookup(distances()), rule.row(distances()))
    far = torch.tensor([-(2**40), -(2**31) - 1, -70000, 70000, 2**31 + 1, 2**40])
    assert table.lookup(far).tolist() == rule.row(far).tolist()
    assert table.lookup(far.view(2, 3)).shape == (2, 3)
    assert table.rows.dtype == torch.int32 and table.lookup(far).dtype == torch.int64


@pytest.mark.parametrize("rule", (*LOGARITHMIC, *CLIPPED, *LINEAR), ids=str)
def test_table_ends_where_rows_saturate(rule):
    table, rows = rule.table(), rule.row(distances()).tolist()
    assert table.rows.numel() == table.last - table.first + 1
    row_of = dict(zip(distances().tolist(), rows, strict=True))
    assert row_of[table.first] == rows[0] != row_of[table.first + 1]
    assert row_of[table.last] == rows[-1] != row_of[table.last - 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    half=st.integers(2, 300),
    stretch=st.integers(2, 3000),
    clip=st.booleans(),
)
def test_any_log_rule(half, stretch, clip):
    rule = RelativePosition(2 * half, 2 * half, half + stretch, clip)
    reach = 2 * rule.max_distance + 50
    x = distances(reach)
    rows = rule.row(x)
    assert torch.equal(rule.table().lookup(x), rows)
    assert (rows.diff() >= 0).all(), "rows must ascend with distance"
    if not clip:
        expected = make_log_bucket_position(x, rule.buckets, rule.max_distance)
        assert torch.equal(rows, transformers_row(expected, rule.span))


def test_saturation_of_v3():
    table = RelativePosition().table()
    assert (table.first, table.last) == (-512, 506)
    assert (int(table.rows[0]), int(table.rows[-1])) == (0, 511)
    assert RelativePosition().row(torch.tensor([-511, -512])).tolist() == [1, 0]


def test_clipping_as_microsoft_does_never_reaches_row_0():
    clipped = RelativePosition(clip_distance=True)
    ends = torch.tensor([-100000, -513, -512, -511, 511, 512, 100000])
    assert clipped.row(ends).tolist() == [1, 1, 1, 1, 511, 511, 511]
    inside = torch.arange(-511, 512)
    assert torch.equal(clipped.row(inside), RelativePosition().row(inside))


def test_table_is_made_once():
    assert RelativePosition().table() is RelativePosition().table("cpu")


def test_table_does_not_follow_the_default_device():
    rule = RelativePosition(14, 14, 30)
    with torch.device("meta"):
        table = rule.table("cpu")
    assert table.rows.device.type == "cpu"


@pytest.mark.parametrize("rule", (LOGARITHMIC[0], CLIPPED[1], LINEAR[1]), ids=str)
def test_ints_round_trip(rule):
    assert all(type(x) is int for x in rule.ints)
    assert RelativePosition.from_ints(rule.ints) == rule


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DebertaConfig(max_relative_positions=-1), RelativePosition(512, None, 512)),
        (DebertaConfig(max_relative_positions=24), RelativePosition(24, None, 24)),
        (DebertaConfig(position_buckets=32), RelativePosition(512, None, 512)),
        (DebertaV2Config(position_buckets=256), RelativePosition(256, 256, 512)),
        (
            DebertaV2Config(position_buckets=32, max_relative_positions=64),
            RelativePosition(32, 32, 64),
        ),
        (DebertaV2Config(max_position_embeddings=128), RelativePosition(128, None, 128)),
        (DebertaV2Config(max_relative_positions=24), RelativePosition(24, None, 24)),
        (ElectraConfig(max_position_embeddings=64), RelativePosition(64, None, 64)),
        (SimpleNamespace(max_position_embeddings=40), RelativePosition(40, None, 40)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_from_config(config, expected):
    assert RelativePosition.from_config(config) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"span": 0}, "span must be at least 1, got 0"),
        ({"span": -3, "buckets": None}, "span must be at least 1, got -3"),
        ({"span": 128}, r"equal to span \(128\), got 256"),
        ({"span": 2, "buckets": 2}, "at least 4 .* got 2"),
        ({"span": 7, "buckets": 7}, "even number .* got 7"),
        ({"span": 256, "buckets": 0}, "buckets must be None .* got 0"),
        ({"max_distance": 129}, "max_distance must exceed .* 129, got 129"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        RelativePosition(**arguments)
