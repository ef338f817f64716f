"""The encoder of every family: embeddings, layers, relative table. The config says which."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..attention import DisentangledAttention
from ..inference import Inference
from ..relative_position import RelativePosition
from .config import Config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "gelu_new": partial(nn.functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "linear": lambda x: x,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "swish": nn.functional.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function a config's hidden_act, conv_act or pooler_hidden_act names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    return ACTIVATIONS[name]


class Embeddings(nn.Module):
    """Token, position and type embeddings, projected to the hidden size and normalised.

    DeBERTa projects (without bias), then normalises and zeroes padding; ELECTRA normalises, then
    projects (with bias).
    """

    def __init__(self, config: Config):
        super().__init__()
        size, hidden = config.embedding_size or config.hidden_size, config.hidden_size
        self.is_electra = config.model_type == "electra"
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings: nn.Embedding | None = None
        self.token_type_embeddings: nn.Embedding | None = None
        if self.is_electra or config.position_biased_input:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        if config.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.embed_proj: nn.Linear | None = None
        if size != hidden:
            self.embed_proj = nn.Linear(size, hidden, bias=self.is_electra)
        width = size if self.is_electra else hidden
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """[..., L] ids (or [..., L, embedding_size]) -> [..., L, hidden]."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        x = inputs_embeds
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(self._positions(x, position_ids))
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                x = x + self.token_type_embeddings.weight[0]
            else:
                limit = self.token_type_embeddings.num_embeddings
                _check_range("token_type_ids", token_type_ids, "type_vocab_size", limit)
                x = x + self.token_type_embeddings(token_type_ids)
        if self.is_electra:
            x = self.dropout(self.LayerNorm(x))
            return x if self.embed_proj is None else self.embed_proj(x)
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        x = self.LayerNorm(x)
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        return self.dropout(x)

    def _positions(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        assert self.position_embeddings is not None
        length, limit = x.size(-2), self.position_embeddings.num_embeddings
        if position_ids is not None:
            _check_range("position_ids", position_ids, "max_position_embeddings", limit)
            return position_ids
        if length > limit:
            raise ValueError(
                f"input_ids may hold at most max_position_embeddings = {limit} tokens a sequence, "
                f"got {length}"
            )
        return torch.arange(length, device=x.device)


class Output(nn.Module):
    """dense -> dropout -> LayerNorm(x + residual)."""

    def __init__(self, width: int, config: Config):
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Attention(nn.Module):
    """Attention and its output projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.self = DisentangledAttention(config)
        self.self.padded_rows = "zeros"
        self.output = Output(config.hidden_size, config)


class Intermediate(nn.Module):
    """The first half of the feed-forward network."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Layer(nn.Module):
    """One transformer layer, normalised after each block."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def forward(self, x: Tensor, query: Tensor | None = None, **attention) -> Tensor:
        """[..., L, hidden] -> the same. query: another source of queries, which is also the
        residual (enhanced mask decoder)."""
        context, _ = self.attention.self(x, query_states=query, **attention)
        x = self.attention.output(context, x if query is None else query)
        return self.output(self.intermediate(x), x)


class Convolution(nn.Module):
    """DeBERTa-v2's convolution over the embeddings, added to the first layer's output."""

    def __init__(self, config: Config):
        super().__init__()
        kernel, hidden = config.conv_kernel_size, config.hidden_size
        self.conv = nn.Conv1d(
            hidden, hidden, kernel, padding=(kernel - 1) // 2, groups=config.conv_groups
        )
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.act = activation(config.conv_act)

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, hidden]; mask [B, L] or None."""
        out = self.conv(x.transpose(1, 2)).transpose(1, 2)
        if mask is not None:
            out = out.masked_fill(~mask.bool().unsqueeze(-1), 0)
        out = self.LayerNorm(residual + self.act(self.dropout(out)))
        return out if mask is None else out * mask.unsqueeze(-1).to(out.dtype)


class Encoder(nn.Module):
    """The layers, and the relative-position table that they share.

    Attributes:
        inference: how calls in eval mode without gradients run on the CPU; None: as all others.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.relative_position: RelativePosition | None = None
        if config.relative_attention:
            self.relative_position = RelativePosition.from_config(config)
            self.rel_embeddings = nn.Embedding(2 * self.relative_position.span, config.hidden_size)
        self.LayerNorm: nn.LayerNorm | None = None
        if "layer_norm" in config.norm_rel_ebd.lower():
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.conv = Convolution(config) if config.conv_kernel_size > 0 else None
        self.inference: Inference | None = Inference()

    def relative_table(self) -> Tensor | None:
        """[2 * span, hidden], normalised once for all layers; None without relative attention."""
        if self.relative_position is None:
            return None
        table = self.rel_embeddings.weight
        return table if self.LayerNorm is None else self.LayerNorm(table)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Sequence[Tensor]:
        """The embeddings and every layer's output, each like x."""
        if self.conv is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens: a model with a convolution takes padded batches only")
        if self.inference is not None:
            inferred = self.inference.run(
                self, self.relative_table, x, mask, cu_seqlens, max_seqlen
            )
            if inferred is not None:
                return inferred
        attention = {
            "attention_mask": mask,
            "relative_pos": self.relative_position,
            "rel_embeddings": self.relative_table(),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
        }
        states = [x]
        for i, layer in enumerate(self.layer):
            x = layer(x, **attention)
            if i == 0 and self.conv is not None:
                x = self.conv(states[0], x, mask)
            states.append(x)
        return states


class Backbone(nn.Module):
    """Embeddings and encoder: a model without its head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Sequence[Tensor]:
        """Embeddings and every layer's output, [B, L, hidden] or packed [T, hidden].

        Raises:
            ValueError: no input or two, ids outside the vocabulary, too long a sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            _check_range("input_ids", input_ids, "vocab_size", self.config.vocab_size)
        if cu_seqlens is not None and position_ids is None:
            position_ids = _packed_positions(cu_seqlens)
        x = self.embeddings(input_ids, token_type_ids, position_ids, attention_mask, inputs_embeds)
        return self.encoder(x, attention_mask, cu_seqlens, max_seqlen)


def _check_range(name: str, ids: Tensor, field: str, limit: int) -> None:
    """Only where reading the ids costs nothing: on the CPU, outside of compiled code."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {field} = {limit}), got {int(low)} to {int(high)}")


def _packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Each packed token's position within its sequence."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return torch.arange(starts.size(0), device=starts.device) - starts


def initialize(module: nn.Module, std: float) -> None:
    """Normal(0, std) weights, zero biases, unit LayerNorm, zero padding row: every family's."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Embedding)):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, (nn.Linear, nn.Conv1d)) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
