"""The published compute of well-known models, from their sizes."""

import pytest

from fastdeberta.models import Config, deberta, electra
from fastdeberta.training.accounting import training_flops


def bert(hidden, layers, **changes):
    return electra.base(
        **{
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "intermediate_size": 4 * hidden,
            "embedding_size": hidden,
            **changes,
        }
    )


def pair(discriminator: Config, width: float, length: int, sequences: float) -> float:
    generator = electra.generator(discriminator, width)
    return training_flops(discriminator, length, sequences, "rtd") + training_flops(
        generator, length, sequences
    )


PUBLISHED = {
    "electra_small": (1.293743798272e18, lambda: pair(electra.small(), 1 / 4, 128, 128 * 1e6)),
    "electra_base": (6.424541834277683e19, lambda: pair(electra.base(), 1 / 3, 512, 256 * 766e3)),
    "electra_400k": (7.117606040895488e20, lambda: pair(electra.large(), 1 / 4, 512, 2048 * 4e5)),
    "electra_1.75M": (
        3.113952642891776e21,
        lambda: pair(electra.large(), 1 / 4, 512, 2048 * 1.75e6),
    ),
    "bert_small": (
        1.4187399146496e18,
        lambda: training_flops(bert(256, 12, embedding_size=128), 128, 128 * 1.45e6),
    ),
    "bert_base": (6.428335104e19, lambda: training_flops(bert(768, 12), 512, 256 * 1e6)),
    "bert_large": (1.91720905883648e20, lambda: training_flops(bert(1024, 24), 512, 256 * 1e6)),
    "roberta": (
        3.187221435776e21,
        lambda: training_flops(bert(1024, 24, vocab_size=50265), 512, 8000 * 5e5),
    ),
    "gpt": (
        3.96875e19,
        lambda: training_flops(
            bert(768, 12, vocab_size=40000), 512, 128 * 960800, output_fraction=1
        ),
    ),
}


# Where the published figure is rounded.
DIGITS = {"gpt": 6}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    """All but ELMo's, which TensorFlow counted: it is no transformer."""
    published, ours = PUBLISHED[name]
    if name in DIGITS:
        assert float(f"{ours():.{DIGITS[name]}g}") == published
    else:
        assert ours() == pytest.approx(published, rel=1e-9)


def test_relative_positions_by_hand():
    config = Config(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=64,
    )
    plain = Config.from_dict({**config.to_dict(), "relative_attention": False})
    length, sequences = 10, 7
    scores = 2 * length * length * 8
    tables = 8 * (2 * 8 * 8 + 8)
    expected = 2 * sequences * 3 * 2 * (scores + tables)
    got = training_flops(config, length, sequences) - training_flops(plain, length, sequences)
    assert got == pytest.approx(expected)
    one = Config.from_dict({**config.to_dict(), "pos_att_type": ["p2c"]})
    half = training_flops(one, length, sequences) - training_flops(plain, length, sequences)
    assert half == pytest.approx(expected / 2)
    linear = Config.from_dict({**config.to_dict(), "position_buckets": -1})
    more = training_flops(linear, length, sequences) - training_flops(plain, length, sequences)
    tables = 2 * length * (2 * 8 * 8 + 8)  # A sequence meets no more distances than that.
    assert more == pytest.approx(2 * sequences * 3 * 2 * (scores + tables))


def test_parts_that_are_predicted():
    config = deberta.v3_small()
    none, some, all_ = (
        training_flops(config, 128, 1, output_fraction=f) for f in (0.0, 0.15625, 1.0)
    )
    assert some - none == pytest.approx(0.15625 * (all_ - none))
    assert training_flops(config, 128, 2) == pytest.approx(2 * some)
    assert training_flops(config, 128, 1, "rtd") < some


def test_unknown_head():
    with pytest.raises(ValueError, match="head must be 'mlm' or 'rtd', got 'span'"):
        training_flops(deberta.v3_small(), 128, 1, "span")
