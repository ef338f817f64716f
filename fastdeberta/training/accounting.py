"""Compute of training: floating-point operations by the formula of ELECTRA's authors.

Counted are mathematical operations, a product of matrices as 2 m n k, an exponential as one, a
backward pass as much as a forward pass, and a look-up in a table as a product with it. So counted,
runs compare with the figures of ELECTRA's paper. Relative positions, of which the formula knows
nothing, are counted as DeBERTa's algorithm has them (its section 3.1.1): every layer projects its
table once a sequence and adds one product to each score for each term.

Source: google-research/electra (flops_computation), whose totals it reproduces.
"""

from ..models import Config

# Operations a value: a draw, a comparison and two products; mean, variance, shift and scale; the
# tanh form of GELU; maximum, exponential, sum and quotient.
DROPOUT, LAYER_NORM, GELU, SOFTMAX = 4, 5, 8, 5

# Of all positions, those whose tokens a masked language model predicts: 80 of 512 at 15 %.
MASKED_FRACTION = 80 / 512


def training_flops(
    config: Config,
    length: int,
    sequences: float,
    head: str = "mlm",
    output_fraction: float = MASKED_FRACTION,
) -> float:
    """Operations of training one network, forward and backward.

    Args:
        config: the network's sizes.
        length: tokens of a sequence. sequences: how many, over the whole training.
        head: "mlm" predicts tokens, "rtd" one bit for every token.
        output_fraction: with "mlm", the part of the positions that is predicted.

    Raises:
        ValueError: another head.
    """
    if head not in ("mlm", "rtd"):
        raise ValueError(f"head must be 'mlm' or 'rtd', got {head!r}")
    output = _tokens_out(config) * output_fraction if head == "mlm" else _bits_out(config)
    layers = config.num_hidden_layers * _layer(config, length)
    return 2 * sequences * length * (layers + _embeddings(config, length) + output)


def _layer(config: Config, length: int) -> float:
    """A layer's forward pass, operations a token."""
    hidden, inner, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    projections = 4 * (2 * hidden * hidden + hidden)
    scores = length * (4 * hidden + heads * (SOFTMAX + DROPOUT + 1))
    feed_forward = 4 * hidden * inner + (GELU + 1) * inner + hidden
    # The first of two norms counts once instead of once a value: a slip of the formula's, kept for
    # the sake of equal totals.
    around = 2 * (DROPOUT + 1) * hidden + LAYER_NORM * (1 + hidden)
    return projections + scores + feed_forward + around + _positions(config, length)


def _positions(config: Config, length: int) -> float:
    if not config.relative_attention:
        return 0.0
    terms = sum(term in config.pos_att_type for term in ("c2p", "p2c"))
    span = config.position_buckets
    if span < 1:
        limit = config.max_relative_positions
        span = limit if limit >= 1 else config.max_position_embeddings
    hidden, rows = config.hidden_size, min(2 * span, 2 * length)
    return terms * (2 * hidden * length + rows * (2 * hidden * hidden + hidden) / length)


def _embeddings(config: Config, length: int) -> float:
    """Input embeddings, operations a token."""
    size, hidden = config.embedding_size or config.hidden_size, config.hidden_size
    operations = 2 * size * config.vocab_size
    operations += 2 * size * (length + 2) + 2 * size + (LAYER_NORM + DROPOUT) * size
    return operations + (2 * hidden * size + hidden if size != hidden else 0)


def _tokens_out(config: Config) -> float:
    """The masked language model's head, operations a predicted token."""
    size, vocab = config.embedding_size or config.hidden_size, config.vocab_size
    transform = 2 * config.hidden_size * size + (1 + GELU + LAYER_NORM) * size
    return 2 * size * vocab + transform + (SOFTMAX + 2) * vocab


def _bits_out(config: Config) -> float:
    """The replaced token head, operations a token."""
    hidden = config.hidden_size
    return 2 * hidden * hidden + (1 + GELU + 2) * hidden
