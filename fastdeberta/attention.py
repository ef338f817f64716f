"""DisentangledAttention: projections around the op, with the parameter names of checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn

from .cache import KeyValueCache
from .composed import composed_attention
from .op import disentangled_attention
from .relative_position import RelativePosition, RowTable


class DisentangledAttention(nn.Module):
    """Drop-in for transformers' DisentangledSelfAttention, of DeBERTa v1 and of v2/v3.

    Takes the same config, has the same parameter names and the same forward. What the fused op
    does not cover (attention weights, pairwise masks, custom relative positions, talking heads,
    queries of another length) runs composed and holds [B, H, L, L] scores.

    Args:
        config: a transformers or fastdeberta config; model_type "deberta" gives v1's fused
            `in_proj` and linear positions, every other type the separate projections of v2/v3.
            relative_attention=False leaves plain attention (ELECTRA).

    Attributes:
        backend: backend of the op, "auto" by default.
        padded_rows: "uniform" (transformers' rows of masked queries) or "zeros".
        composed: padded batches run composed also where the fused op covers them; see `compose`.

    Raises:
        ValueError: sizes that do not divide, or an unknown pos_att_type.

    Source: DeBERTa, section 3.1; parameter layout of the microsoft/deberta-* checkpoints.
    """

    def __init__(self, config: Any):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        if hidden % heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads ({heads}), got {hidden}"
            )
        self.is_v1 = getattr(config, "model_type", None) == "deberta"
        self.num_attention_heads = heads
        self.attention_head_size = hidden // heads
        if not self.is_v1:
            self.attention_head_size = getattr(config, "attention_head_size", hidden // heads)
        self.all_head_size = heads * self.attention_head_size
        self.relative_attention = bool(getattr(config, "relative_attention", False))
        self.pos_att_type = _pos_att_type(config)
        self.share_att_key = not self.is_v1 and bool(getattr(config, "share_att_key", False))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.backend = "auto"
        self.padded_rows = "uniform"
        self.composed = False
        self._row_table: RowTable | None = None

        width = self.all_head_size
        if self.is_v1:
            self.in_proj = nn.Linear(hidden, 3 * width, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        else:
            self.query_proj = nn.Linear(hidden, width)
            self.key_proj = nn.Linear(hidden, width)
            self.value_proj = nn.Linear(hidden, width)

        talking_head = self.is_v1 and getattr(config, "talking_head", False)
        self.head_logits_proj = nn.Linear(heads, heads, bias=False) if talking_head else None
        self.head_weights_proj = nn.Linear(heads, heads, bias=False) if talking_head else None

        if self.relative_attention:
            self.relative_position = RelativePosition.from_config(config)
            self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)
            c2p, p2c = "c2p" in self.pos_att_type, "p2c" in self.pos_att_type
            if self.is_v1:
                if c2p:
                    self.pos_proj = nn.Linear(hidden, width, bias=False)
                if p2c:
                    self.pos_q_proj = nn.Linear(hidden, width)
            elif not self.share_att_key:
                if c2p:
                    self.pos_key_proj = nn.Linear(hidden, width)
                if p2c:
                    self.pos_query_proj = nn.Linear(hidden, width)

    def compose(self, composed: bool = True) -> None:
        """Sets `composed`. Traced graphs then hold PyTorch's own operators alone, and look rows up
        in a table instead of taking logarithms."""
        self.composed = composed
        self._row_table = None
        if composed and self.relative_attention:  # Made here: no trace can make it.
            self._row_table = self.relative_position.table()

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(D * terms), with terms counted as the checkpoint's family counts them."""
        if self.is_v1:  # v1 counts every entry of the list, also a "p2p" that adds no score.
            terms = 1 + len(self.pos_att_type)
        else:
            terms = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        return (self.attention_head_size * terms) ** -0.5

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | RelativePosition | None = None,
        rel_embeddings: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of `hidden_states` (or `query_states`) over `hidden_states`.

        Args:
            hidden_states: [B, L, hidden]; or packed [T, hidden] with `cu_seqlens`.
            attention_mask: [B, L] or [T], nonzero = a token to attend to; or the pairwise
                [B, 1, L, L] (or [B, L, L], [B, 1, 1, L]) that transformers' encoders pass. A
                pairwise mask made from a [B, L] one is recognised, by reading it, and fused.
            output_attentions: also return the probabilities; holds [B, H, L, L].
            query_states: [B, Lq, hidden], another source of queries (EMD).
            relative_pos: distances as transformers builds them, [L, L], [1, L, L], [B, L, L] or
                [B, 1, L, L]; or a RelativePosition of the table's span, which stands for its
                distances without building them. None means none for v1 and the built-in ones for
                v2/v3, as in transformers.
            rel_embeddings: [2 * span, hidden], the table.
            cu_seqlens, max_seqlen, causal: see `disentangled_attention`.
            cache: an empty one is filled with the call's keys, values and tables. With a filled one
                hidden_states is the next token of every sequence, [B, 1, hidden], attention_mask
                covers all tokens so far, [B, Lk], and relative_pos is their distances, [1, Lk].

        Returns:
            (context, None) or (context, probabilities [B, H, Lq, L]); context has the shape of
            the queries with all_head_size columns.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message names it.
        """
        query, key, value = self._project(hidden_states, query_states)
        if cache is not None and cache.length:
            key, value = cache.append(key, value)
            pos_key, pos_query = cache.tables
        else:
            pos_key, pos_query = self.project_positions(rel_embeddings, relative_pos)
            if cache is not None:
                cache.fill(key, value, pos_key, pos_query)
        key_mask = None
        if cu_seqlens is not None:
            fused = not output_attentions and self.head_logits_proj is None
            if not fused:
                raise ValueError(
                    "cu_seqlens cannot be combined with output_attentions or talking heads: "
                    "both need a padded [B, L, hidden] batch"
                )
            key_mask = attention_mask
        else:
            fused, key_mask = self._fusable(
                query, key, attention_mask, output_attentions, relative_pos
            )
        dropout_p = self.dropout.p if self.training else 0.0
        if fused:
            has_positions = pos_key is not None or pos_query is not None
            context: Any = disentangled_attention(
                query,
                key,
                value,
                pos_key,
                pos_query,
                relative_position=self._rule(relative_pos) if has_positions else None,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                causal=causal,
                dropout_p=dropout_p,
                softmax_scale=self.softmax_scale,
                padded_rows=self.padded_rows,
                backend=self.backend,
            )
            return context.flatten(-2), None

        rows = None
        if pos_key is not None or pos_query is not None:
            rows = self._rows(relative_pos, query.size(1), key.size(1), query.device)
        mask = _pairwise(attention_mask, query.size(1))
        if causal:
            past = _distances(query.size(1), query.device) >= 0
            mask = past if mask is None else mask & past
        context, probs = composed_attention(
            query,
            key,
            value,
            pos_key,
            pos_query,
            rows=rows,
            mask=mask,
            softmax_scale=self.softmax_scale,
            dropout_p=dropout_p,
            padded_rows=self.padded_rows,
            mix_scores=self.head_logits_proj,
            mix_probs=self.head_weights_proj,
        )
        return context.flatten(-2), probs if output_attentions else None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size))

    def _project(self, hidden: Tensor, queries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [..., H, D]."""
        if not self.is_v1:
            query = self.query_proj(hidden if queries is None else queries)
            return (
                self._heads(query),
                self._heads(self.key_proj(hidden)),
                self._heads(self.value_proj(hidden)),
            )
        # Rows of in_proj are interleaved by head: [q_h, k_h, v_h].
        fused = self.in_proj(hidden).unflatten(-1, (self.num_attention_heads, -1))
        query, key, value = fused.chunk(3, dim=-1)
        if queries is not None:
            weight = self.in_proj.weight.unflatten(0, (self.num_attention_heads, -1))
            weight = weight[:, : self.attention_head_size].flatten(0, 1)
            query = self._heads(nn.functional.linear(queries, weight))
        return query + self._heads(self.q_bias), key, value + self._heads(self.v_bias)

    def joint_projection(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * H * D, hidden] and bias [3 * H * D]: query, key and value in one product."""
        if not self.is_v1:
            parts = (self.query_proj, self.key_proj, self.value_proj)
            return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        weight = self.in_proj.weight.unflatten(0, (self.num_attention_heads, 3, -1))
        no_bias = torch.zeros_like(self.q_bias)
        return weight.transpose(0, 1).flatten(0, 2), torch.cat([self.q_bias, no_bias, self.v_bias])

    def project_positions(
        self, rel_embeddings: Tensor | None, relative_pos: Tensor | RelativePosition | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """pos_key and pos_query, [2 * span, H, D], each None where its term is off."""
        if not self.relative_attention or not self.pos_att_type:
            return None, None
        if self.is_v1 and (rel_embeddings is None or relative_pos is None):
            return None, None
        if rel_embeddings is None:
            raise ValueError(
                "rel_embeddings must be the relative table [2 * span, hidden], got None"
            )
        rows = 2 * self.relative_position.span
        if self._rule(relative_pos).span != self.relative_position.span:
            raise ValueError(
                f"relative_pos must have the table's span {self.relative_position.span}, "
                f"got {relative_pos}"
            )
        if rel_embeddings.dim() != 2 or rel_embeddings.size(0) < rows:
            raise ValueError(
                f"rel_embeddings must be [2 * span = {rows}, hidden], "
                f"got {list(rel_embeddings.shape)}"
            )
        table = self.pos_dropout(rel_embeddings)[:rows]
        pos_key = pos_query = None
        if "c2p" in self.pos_att_type:
            pos_key = self._heads(self._position_projections()[0](table))
        if "p2c" in self.pos_att_type:
            pos_query = self._heads(self._position_projections()[1](table))
        return pos_key, pos_query

    def _rule(self, relative_pos: Tensor | RelativePosition | None) -> RelativePosition:
        return (
            relative_pos if isinstance(relative_pos, RelativePosition) else self.relative_position
        )

    def _position_projections(self) -> tuple[Any, Any]:
        if self.is_v1:
            names = ("pos_proj", "pos_q_proj")
        elif self.share_att_key:
            names = ("key_proj", "query_proj")
        else:
            names = ("pos_key_proj", "pos_query_proj")
        return getattr(self, names[0], None), getattr(self, names[1], None)

    def _fusable(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        output_attentions: bool,
        relative_pos: Tensor | RelativePosition | None,
    ) -> tuple[bool, Tensor | None]:
        """Whether the fused op covers this call, and the key mask to give it."""
        if self.composed or output_attentions or self.head_logits_proj is not None:
            return False, None
        if query.shape != key.shape:
            return False, None
        if isinstance(relative_pos, Tensor) and self.relative_attention:
            if torch.compiler.is_compiling():  # Recognising it would read data in the graph.
                return False, None
            expected = self.relative_position.bucket(_distances(query.size(1), query.device))
            if not _equal(relative_pos, expected):
                return False, None
        if mask is None:
            return True, None
        if mask.dim() == 2:
            return True, mask.bool()
        if torch.compiler.is_compiling():
            return False, None
        pairs = _pairwise(mask, query.size(1))
        assert pairs is not None
        if pairs.shape[-3:] != (1, query.size(1), key.size(1)):
            return False, None
        key_mask = pairs[:, 0].diagonal(dim1=-2, dim2=-1)
        fused = torch.equal(pairs[:, 0], key_mask[:, None, :] & key_mask[:, :, None])
        return fused, key_mask.expand(query.size(0), -1)

    def _rows(
        self,
        relative_pos: Tensor | RelativePosition | None,
        query_len: int,
        key_len: int,
        device: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """Rows of c2p and of p2c, broadcastable to [B, 1, Lq, Lk]."""
        span = self.relative_position.span
        if not isinstance(relative_pos, Tensor):
            distance = (
                torch.arange(query_len, device=device)[:, None]
                - torch.arange(key_len, device=device)[None, :]
            )
            rule, table = self._rule(relative_pos), self._row_table
            if table is not None and rule == self.relative_position:
                rows = table._replace(rows=table.rows.to(device)).lookup(distance)
            else:
                rows = rule.row(distance)
            return rows[None, None], rows[None, None]
        if relative_pos.dim() not in (2, 3, 4):
            raise ValueError(
                f"relative_pos must have 2, 3 or 4 dimensions, got {list(relative_pos.shape)}"
            )
        relative_pos = relative_pos.long().to(device)
        while relative_pos.dim() < 4:
            relative_pos = relative_pos.unsqueeze(0 if relative_pos.dim() == 2 else 1)
        # v1 cuts its table to the sequence first, which a caller's longer distances can tell.
        reach = min(span, max(query_len, key_len)) if self.is_v1 else span
        c2p = relative_pos.clamp(-reach, reach - 1) + span
        if query_len != key_len:
            return c2p, c2p
        # p2c reads the distance from key to query; only an antisymmetric matrix makes it c2p's row.
        p2c = -relative_pos.transpose(-1, -2)
        return c2p, p2c.clamp(-reach, reach - 1) + span


def set_backend(model: nn.Module, backend: str) -> None:
    """Names the attention backend of every layer."""
    for module in model.modules():
        if isinstance(module, DisentangledAttention):
            module.backend = backend


def _pos_att_type(config: Any) -> list[str]:
    """The list of position terms; checkpoints write "p2c|c2p" or ["p2c", "c2p"]."""
    terms = getattr(config, "pos_att_type", None) or []
    if isinstance(terms, str):
        terms = terms.split("|")
    terms = [term.strip().lower() for term in terms if term.strip()]
    unknown = set(terms) - {"c2p", "p2c", "p2p"}
    if unknown:
        raise ValueError(f"pos_att_type may hold c2p, p2c and p2p; got {sorted(unknown)}")
    return terms


def _pairwise(mask: Tensor | None, query_len: int) -> Tensor | None:
    """Any form of attention_mask as bool [B, 1, Lq or 1, Lk]."""
    if mask is None:
        return None
    mask = mask.bool()
    if mask.dim() == 2:
        keys = mask[:, None, :]
        # Queries of another length are other tokens, of which the mask says nothing.
        mask = keys & mask[:, :, None] if mask.size(1) == query_len else keys
    if mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4:
        raise ValueError(f"attention_mask must have 2, 3 or 4 dimensions, got {list(mask.shape)}")
    return mask


def _distances(length: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    return position[:, None] - position[None, :]


def _equal(relative_pos: Tensor, expected: Tensor) -> bool:
    """Whether relative_pos is `expected` [L, L], once for each of its leading dimensions."""
    if relative_pos.shape[-2:] != expected.shape:
        return False
    return bool((relative_pos == expected).all())
