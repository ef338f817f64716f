"""The encoder of every family: embeddings, layers, relative table. The config says which."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import DisentangledAttention
from ..inference import Inference
from ..packing import Packing, PaddedStates, positions, sequence_of
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
    projects (with bias). With an enhanced mask decoder the position table is the decoder's, and is
    added here only if position_biased_input.
    """

    def __init__(self, config: Config):
        super().__init__()
        size, hidden = config.embedding_size or config.hidden_size, config.hidden_size
        self.config = config
        self.is_electra = config.model_type == "electra"
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings: nn.Embedding | None = None
        self.token_type_embeddings: nn.Embedding | None = None
        self.position_biased_input = self.is_electra or config.position_biased_input
        if self.position_biased_input or config.emd:
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
        if self.position_biased_input:
            x = x + self.positions(x, position_ids)
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

    def positions(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        """Position embeddings [..., L, embedding_size] for x [..., L, any]."""
        assert self.position_embeddings is not None
        length, limit = x.size(-2), self.position_embeddings.num_embeddings
        if position_ids is not None:
            _check_range("position_ids", position_ids, "max_position_embeddings", limit)
            return self.position_embeddings(position_ids)
        self.check_length(length)
        return self.position_embeddings.weight[:length]

    def check_length(self, length: int) -> None:
        """Raises ValueError where the position table is too short."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"input_ids may hold at most max_position_embeddings = {limit} tokens a sequence, "
                f"got {length}"
            )


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

    def forward(
        self, x: Tensor, query: Tensor | None = None, rows: Tensor | None = None, **attention
    ) -> tuple[Tensor, Tensor | None]:
        """[..., L, hidden] -> the same, and the attention's probabilities if asked for. query:
        another source of queries, which is also the residual (enhanced mask decoder). rows: int64
        [N], tokens of the flattened batch whose output is wanted alone, [N, hidden]."""
        context, probs = self.attention.self(x, query_states=query, **attention)
        x = x if query is None else query
        if rows is not None:
            context, x = _choose(context, rows), _choose(x, rows)
        x = self.attention.output(context, x)
        return self.output(self.intermediate(x), x), probs


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

    def forward(
        self, x: Tensor, residual: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """[B, L, hidden] and mask [B, L] or None; or packed [T, hidden], [T] with cu_seqlens."""
        out = self._convolve(x, cu_seqlens)
        if mask is not None:
            out = out.masked_fill(~mask.bool().unsqueeze(-1), 0)
        out = self.LayerNorm(residual + self.act(self.dropout(out)))
        return out if mask is None else out * mask.unsqueeze(-1).to(out.dtype)

    def _convolve(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is None:
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        # One long row, in which as many zeros as the kernel reaches stand between two sequences.
        gap = (self.conv.kernel_size[0] - 1) // 2
        total, count = x.size(0), cu_seqlens.size(0) - 1
        place = torch.arange(total, device=x.device) + gap * sequence_of(cu_seqlens, total)
        row = x.new_zeros(total + gap * count, x.size(1)).index_copy(0, place, x)
        return self.conv(row.t().unsqueeze(0)).squeeze(0).t().index_select(0, place)


class Encoder(nn.Module):
    """The layers, and the relative-position table that they share.

    Attributes:
        inference: how calls in eval mode without gradients run on the CPU; None: as all others.
        activation_checkpointing: in training keep every layer's input alone, and run the layer
            again in the backward pass.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.relative_position: RelativePosition | None = None
        if config.relative_attention:
            self.relative_position = RelativePosition.from_config(config)
            self.rel_embeddings = nn.Embedding(2 * self.relative_position.span, config.hidden_size)
        self.LayerNorm: nn.LayerNorm | None = None
        if config.model_type != "deberta" and "layer_norm" in config.norm_rel_ebd.lower():
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.conv = Convolution(config) if config.conv_kernel_size > 0 else None
        self.inference: Inference | None = Inference()
        self.activation_checkpointing = False

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
        causal: bool = False,
        num_layers: int | None = None,
        attentions: list[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """The embeddings and every layer's output, each like x.

        Args:
            num_layers: run at least so many layers; None: all.
            attentions: gets every layer's probabilities [B, H, L, L].
            rows: int64 [N], tokens of the flattened batch: returned is the last layer's output of
                these alone, [N, hidden], and the others are spared its feed-forward network.
        """
        if causal and self.conv is not None:
            raise ValueError("causal: a convolution shows every token the next one")
        plain = not causal and attentions is None
        if self.inference is not None and plain:
            inferred = self.inference.run(
                self, self.relative_table, x, mask, cu_seqlens, max_seqlen, rows
            )
            if inferred is not None:
                return inferred
        attention = self.attention_arguments(mask, cu_seqlens, max_seqlen, causal)
        states, whole = [x], True
        for i, layer in enumerate(self.layer[:num_layers]):
            # The convolution reads every token's output of the first layer.
            whole = rows is None or i < len(self.layer) - 1 or (i == 0 and self.conv is not None)
            run: Callable[..., Any] = layer
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                run = partial(checkpoint, layer, use_reentrant=False)
            x, probs = run(
                x,
                rows=None if whole else rows,
                output_attentions=attentions is not None,
                **attention,
            )
            if i == 0 and self.conv is not None:
                x = self.conv(states[0], x, mask, cu_seqlens)
            states.append(x)
            if attentions is not None and probs is not None:
                attentions.append(probs)
        if rows is None:
            return states
        return [_choose(x, rows) if whole else x]

    def attention_arguments(
        self,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        causal: bool = False,
    ) -> dict[str, Any]:
        """What every layer's attention is given beside its input."""
        return {
            "attention_mask": mask,
            "relative_pos": self.relative_position,
            "rel_embeddings": self.relative_table(),
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "causal": causal,
        }


class Backbone(nn.Module):
    """Embeddings, encoder and, where the config asks for it, the enhanced mask decoder.

    The decoder runs the last layer, with its own weights, emd_passes times: keys and values are
    the second-to-last layer's output, the first queries that output plus absolute position
    embeddings, every further pass's queries the output of the one before.

    Attributes:
        unpad: leave padding out of padded batches before the embeddings and put zeros in its place
            at the end. Not in compiled code, where shapes must not depend on values.

    Source: DeBERTa, section 3.2; microsoft/DeBERTa's masked language model.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.unpad = not config.talking_head  # That mixes heads of padded batches.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool | None = None,
        attentions: list[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Embeddings and every layer's output, [B, L, hidden] or packed [T, hidden].

        The last of them is the mask decoder's, if there is one. causal: None: as the config says.
        attentions: gets every layer's probabilities, [B, H, L, L]. rows: int64 [N], tokens of the
        flattened batch that are not padding: see `Encoder.forward`.

        Raises:
            ValueError: no input or two, ids outside the vocabulary, too long a sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            _check_range("input_ids", input_ids, "vocab_size", self.config.vocab_size)
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        tokens = given.shape[: 2 if cu_seqlens is None else 1]
        if attention_mask is not None and attention_mask.shape != tokens:
            raise ValueError(
                f"attention_mask must have one value a token, {list(tokens)}, "
                f"got {list(attention_mask.shape)}"
            )
        causal = self.config.is_decoder if causal is None else causal
        packing = None
        if self.unpad and cu_seqlens is None and attentions is None and not _traced():
            packing = Packing.of(attention_mask)
        if packing is not None:
            length = packing.shape[1]
            if position_ids is None and self.embeddings.position_embeddings is not None:
                self.embeddings.check_length(length)
                position_ids = torch.arange(length, device=packing.kept.device)[None]
            input_ids, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else packing.pack(x if x.dim() > 1 else x[None])
                for x in (input_ids, token_type_ids, position_ids, inputs_embeds)
            )
            attention_mask = packing.key_mask
            cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
            if rows is not None:
                place = torch.empty(tokens.numel(), dtype=torch.long, device=rows.device)
                place[packing.kept] = torch.arange(len(packing.kept), device=rows.device)
                rows = place[rows]
        elif cu_seqlens is not None and position_ids is None:
            position_ids = positions(cu_seqlens, given.size(0))
        x = self.embeddings(input_ids, token_type_ids, position_ids, attention_mask, inputs_embeds)
        arguments = (attention_mask, cu_seqlens, max_seqlen, causal)
        if self.config.emd:
            depth = self.config.num_hidden_layers - 1
            states = self.encoder(x, *arguments, num_layers=depth, attentions=attentions)
            decoded = self._decode(states[depth], position_ids, rows, *arguments)
            states = [*states[: depth + 1], decoded] if rows is None else [decoded]
        else:
            states = self.encoder(x, *arguments, attentions=attentions, rows=rows)
        return states if packing is None or rows is not None else PaddedStates(states, packing)

    def _decode(
        self, x: Tensor, position_ids: Tensor | None, rows: Tensor | None, *arguments: Any
    ) -> Tensor:
        """The enhanced mask decoder: the second-to-last layer's output -> the same shape, or the
        last pass's rows alone."""
        added = self.embeddings.positions(x, position_ids)
        if self.embeddings.embed_proj is not None:
            added = self.embeddings.embed_proj(added)
        query = x + added
        attention = self.encoder.attention_arguments(*arguments)
        for i in range(self.config.emd_passes):
            last = rows if i == self.config.emd_passes - 1 else None
            query, _ = self.encoder.layer[-1](x, query, last, **attention)
        return query


def _choose(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened batch: [..., L, hidden], int64 [N] -> [N, hidden]."""
    return x.flatten(0, -2).index_select(0, rows)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _check_range(name: str, ids: Tensor, field: str, limit: int) -> None:
    """Only where reading the ids costs nothing: on the CPU, outside of compiled code."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = torch.aminmax(ids)
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {field} = {limit}), got {int(low)} to {int(high)}")


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
