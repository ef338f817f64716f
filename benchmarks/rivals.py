"""The rivals in attention, one function each. Each takes Inputs, on any device, prepares what may
be prepared and returns a call, which gives [B, L, H * D].

Optional packages are imported where they are needed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastdeberta

from .cases import RULE, Shape


class Inputs(NamedTuple):
    """One layer's projected tensors: [B, L, H, D], and [2 * span, H, D], which both position terms
    read, as with one table for all layers."""

    query: Tensor
    key: Tensor
    value: Tensor
    table: Tensor

    @classmethod
    def random(
        cls, shape: Shape, dtype: torch.dtype, training: bool = False, device: str = "cpu"
    ) -> "Inputs":
        size = (shape.heads, shape.head_dim)

        def tensor(*leading: int) -> Tensor:
            values = torch.randn(*leading, *size, device=device)
            return values.to(dtype).requires_grad_(training)

        content = [tensor(shape.batch, shape.length) for _ in range(3)]
        return cls(*content, tensor(2 * RULE.span))

    @property
    def scale(self) -> float:
        return (3 * self.query.size(-1)) ** -0.5


def step(
    make: Callable[[Inputs], Callable[[], Tensor]], x: Inputs, part: str
) -> Callable[[], object]:
    """One pass of a rival: "forward"; "forward+backward" or "backward", which give the gradients
    of all inputs, None for those that the rival does not use."""
    attention = make(x)
    same = torch.Generator().manual_seed(1)  # For every rival.
    dout = torch.randn(x.query.flatten(2).shape, generator=same).to(x.query)

    def forward() -> object:
        with torch.no_grad():
            return attention()

    def backward(out: Tensor, keep: bool = False) -> object:
        return torch.autograd.grad(out, x, dout, retain_graph=keep, allow_unused=True)

    if part == "forward":
        return forward
    if part == "forward+backward":
        return lambda: backward(attention())
    out = attention()
    return lambda: backward(out, keep=True)


class Given(nn.Module):
    """Stands for a projection whose result is given."""

    def __init__(self, result: Tensor):
        super().__init__()
        self.result = [result]  # In a list: no parameter of this module.

    def forward(self, x: Tensor) -> Tensor:
        return self.result[0]


def ours(x: Inputs, backend: str = "auto", key_mask: Tensor | None = None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        out = fastdeberta.disentangled_attention(
            *x, x.table, relative_position=RULE, key_mask=key_mask, backend=backend
        )
        return out.flatten(2)

    return call


def eager(x: Inputs) -> Callable[[], Tensor]:
    """transformers' own attention; projections pass through, positions and mask are ready."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as module

    batch, length = x.query.shape[:2]
    # Found on the CPU: another device may round a logarithm to the next bucket.
    tokens = torch.empty(length, 1)
    distances = module.build_relative_position(
        tokens, tokens, bucket_size=RULE.buckets, max_position=RULE.max_distance
    ).to(x.query.device)
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool, device=x.query.device)
    return _module(module.DisentangledSelfAttention, x, mask, relative_pos=distances)


def flash_deberta(x: Inputs) -> Callable[[], Tensor]:
    """FlashDeBERTa's attention, whose kernels need CUDA. It is given no mask, which it would sum
    up to see whether there is padding, waiting for the device."""
    from flashdeberta import FlashDisentangledSelfAttention

    return _module(FlashDisentangledSelfAttention, x, None)


def _module(
    kind: type[nn.Module], x: Inputs, mask: Tensor | None, **options: Tensor
) -> Callable[[], Tensor]:
    """An attention module with transformers' names; projections pass through."""
    attention = kind(_attention_config(x)).eval()
    attention.query_proj = attention.key_proj = nn.Identity()
    attention.pos_key_proj = attention.pos_query_proj = nn.Identity()
    query, key, value, table = (tensor.flatten(-2) for tensor in x)
    attention.value_proj = Given(value)
    return lambda: attention(key, mask, query_states=query, rel_embeddings=table, **options)[0]


def sdpa(x: Inputs) -> Callable[[], Tensor]:
    """torch's attention without positions: what they cost, at the least."""
    query, key, value = (tensor.transpose(1, 2) for tensor in x[:3])

    def call() -> Tensor:
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).flatten(2)

    return call


def flex(x: Inputs) -> Callable[[], Tensor]:
    """torch's FlexAttention, compiled: positions are gathered from two ordinary products."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # Each shape compiles anew, and there is a limit to that.
    config.donated_buffer = False  # Otherwise there is one backward pass for each forward pass.
    query, key, value = (tensor.transpose(1, 2) for tensor in x[:3])
    table, length = x.table.permute(1, 2, 0), x.query.size(1)
    rows = RULE.row(torch.arange(1 - length, length)).to(x.query.device)

    # Products inside would be left unmade where score_mod reads them, which does not compile.
    @torch.compile(dynamic=False)
    def attention(query, key, value, c2p, p2c):
        def add_positions(score, b, h, i, j):
            row = rows[i - j + length - 1]
            return score + (c2p[b, h, i, row] + p2c[b, h, j, row]) * x.scale

        return flex_attention(query, key, value, score_mod=add_positions, scale=x.scale)

    def call() -> Tensor:
        out = attention(query, key, value, query @ table, key @ table)
        return out.transpose(1, 2).flatten(2)

    return call


def disentangled_flash(x: Inputs) -> Callable[[], Tensor]:
    """disentangled-flash's attention: its kernels on a GPU, its composed PyTorch on a CPU."""
    import disentangled_flash as package
    from disentangled_flash._torch import TorchTrainingDisentangledSelfAttention

    training, on_gpu, options = x.query.requires_grad, x.query.is_cuda, {}
    if not training:
        kind = package.DisentangledFlashAttention
        options["backend"] = "triton" if on_gpu else "torch"
    elif on_gpu:
        kind = package.TritonTrainingDisentangledSelfAttention
    else:
        kind = TorchTrainingDisentangledSelfAttention
    attention = kind(_attention_config(x), assume_unpadded=True, **options)
    attention = attention.to(x.query.device, x.query.dtype).eval()
    attention.pos_key_proj = attention.pos_query_proj = nn.Identity()
    query, key, value, table = (tensor.flatten(-2) for tensor in x)
    attention._project_qkv = lambda hidden: (query, key, value)
    mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    if training:
        return lambda: attention(query, mask, rel_embeddings=table)[0]
    with torch.no_grad():
        attention.prepare_for_inference(table)
        plan = attention.prepare_shape(query.size(1))
    return lambda: attention.forward_prepared(query, mask, plan)[0]


def _attention_config(x: Inputs):
    from transformers import DebertaV2Config

    heads, size = x.query.shape[-2:]
    return DebertaV2Config(
        hidden_size=heads * size,
        num_attention_heads=heads,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=RULE.buckets,
        max_position_embeddings=RULE.max_distance,
        # Two projections of positions, which can be left out; with True they are query's and key's.
        share_att_key=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
