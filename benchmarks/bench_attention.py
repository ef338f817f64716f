"""How long does the attention of one layer take, beside its rivals?

pytest-benchmark times our op; `extra_info` has every rival's median, all taken in turn in one
process, and the ratios to ours. Projections are left out on every side.
"""

from collections.abc import Callable

import pytest
import torch

import fastdeberta
from fastdeberta.timing import interleaved

from .cases import SHAPES, Shape

RULE = fastdeberta.RelativePosition()


def eager(config, query, key):
    """transformers' own position terms and softmax, given projected tensors."""
    module = pytest.importorskip(
        "transformers.models.deberta_v2.modeling_deberta_v2", reason="transformers is not installed"
    )
    attention = module.DisentangledSelfAttention(config)
    # The tables come projected already: identity projections pass them through.
    attention.key_proj = attention.query_proj = torch.nn.Identity()
    positions = module.build_relative_position(
        query, key, bucket_size=RULE.buckets, max_position=RULE.max_distance
    )

    def scores(q, k, table):
        scale = module.scaled_size_sqrt(q, 3)
        content = torch.bmm(q, k.transpose(-1, -2) / scale)
        return content + attention.disentangled_attention_bias(q, k, positions, table, 3)

    return scores


def rivals(shape: Shape, training: bool) -> dict[str, Callable[[], object]]:
    """Functions without arguments: ours, transformers' eager code, torch's SDPA (content only)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    b, n, h, d = shape.batch, shape.length, shape.heads, shape.head_dim

    def tensor(*size: int) -> torch.Tensor:
        return torch.randn(*size, requires_grad=training)

    q, k, v = (tensor(b, n, h, d) for _ in range(3))
    table = tensor(2 * RULE.span, h * d)
    config = transformers.DebertaV2Config(
        hidden_size=h * d,
        num_attention_heads=h,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=RULE.buckets,
        share_att_key=True,
        hidden_dropout_prob=0.0,
    )
    heads_first = [x.detach().transpose(1, 2).reshape(b * h, n, d) for x in (q, k, v)]
    eq, ek, ev = (x.requires_grad_(training) for x in heads_first)
    scores = eager(config, eq, ek)
    sq, sk, sv = (x.unflatten(0, (b, h)) for x in (eq, ek, ev))

    def run(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return function()

        return (lambda: function().sum().backward()) if training else forward

    def ours() -> torch.Tensor:
        # As share_att_key does: both terms read one table.
        heads = table.unflatten(-1, (h, d))
        return fastdeberta.disentangled_attention(q, k, v, heads, heads, relative_position=RULE)

    return {
        "fastdeberta": run(ours),
        "transformers eager": run(lambda: torch.bmm(scores(eq, ek, table).softmax(-1), ev)),
        "torch SDPA, content only": run(
            lambda: torch.nn.functional.scaled_dot_product_attention(sq, sk, sv)
        ),
    }


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.id)
def test_attention(benchmark, shape: Shape, training: bool) -> None:
    functions = rivals(shape, training)
    medians = interleaved(functions, seconds=2.0)
    ours = medians["fastdeberta"]
    benchmark.extra_info["median_ms"] = {k: round(v, 3) for k, v in medians.items()}
    benchmark.extra_info["ratio_to_ours"] = {k: round(v / ours, 2) for k, v in medians.items()}
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(functions["fastdeberta"], rounds=5, warmup_rounds=1)
