"""transformers' ELECTRA: its attention on our op, its encoder's inference on packed weights.

Classes for `accelerate`, which gives them to modules that exist; nothing here is constructed. Calls
that they do not cover (a cache, cross-attention, causal attention, attention probabilities, masks
that differ from query to query, another attention implementation than eager and sdpa) go to
transformers' own methods.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra

from ..inference import Inference
from ..op import disentangled_attention

# Arguments that attention of a whole sequence does not read.
_INERT = frozenset(
    {"num_items_in_batch", "output_hidden_states", "position_ids", "return_dict", "use_cache"}
)


class ElectraSelfAttention(modeling_electra.ElectraSelfAttention):
    """Ordinary attention of every token over the visible ones.

    Where there is padding, its own rows attend too, as in transformers.
    """

    backend: str
    relative_attention = False

    @staticmethod
    def fits(attention: Any) -> bool:
        return True

    def accelerated(self, backend: str, inference: bool) -> None:
        self.backend = backend

    def restored(self) -> None:
        del self.backend

    @property
    def softmax_scale(self) -> float:
        return self.attention_head_size**-0.5

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        """attention_mask: [B, 1, 1, L], bool or additive, or None for the fast ways."""
        if args or not self._covers(attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            projection(hidden_states).unflatten(-1, heads)
            for projection in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout.p if self.training else 0.0
        context = self._attend(query, key, value, attention_mask, dropout_p)
        return context.flatten(-2), None

    def joint_projection(self) -> tuple[Tensor, Tensor]:
        """Weight [3 * H * D, hidden] and bias [3 * H * D]: query, key and value in one product."""
        parts = (self.query, self.key, self.value)
        return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])

    def project_positions(self, rel_embeddings, relative_pos) -> tuple[None, None]:
        return None, None

    def covers_sequences(self) -> bool:
        """Whether this is attention over a sequence in both directions, without position scores."""
        if self.is_decoder or getattr(self, "is_causal", False):
            return False
        # Of transformers 4.57, where attention has no config and is always eager.
        if getattr(self, "position_embedding_type", "absolute") != "absolute":
            return False
        config = getattr(self, "config", None)
        return getattr(config, "_attn_implementation", None) in (None, "eager", "sdpa")

    def _covers(self, mask: Any, kwargs: dict[str, Any]) -> bool:
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape[1:-1] != (1, 1)):
            return False
        return self.covers_sequences() and is_plain(getattr(self, "config", None), kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
    ) -> Tensor:
        if mask is None:
            return disentangled_attention(  # type: ignore[return-value]
                query, key, value, dropout_p=dropout_p, backend=self.backend
            )
        if mask.is_floating_point():  # Under autocast, the mask's dtype is not the products'.
            mask = mask.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, scale=self.softmax_scale
        )
        return context.transpose(1, 2)


class ElectraEncoder(modeling_electra.ElectraEncoder):
    """Reads the mask once for all layers."""

    inference: Inference | None

    @staticmethod
    def fits(encoder: Any) -> bool:
        return True

    def accelerated(self, backend: str, inference: bool) -> None:
        self.inference = Inference() if inference else None

    def restored(self) -> None:
        del self.inference

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        """attention_mask: any that transformers passes; [B, 1, L or 1, L] for the fast ways."""
        if self.config.is_decoder:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        attention_mask = _of_keys(attention_mask)
        last = None if args else self._infer(hidden_states, attention_mask, kwargs)
        if last is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if kwargs.get("return_dict", True):
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
        return (last,)

    def _infer(self, x: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor | None:
        if self.inference is None or x.device.type != "cpu" or not is_plain(self.config, kwargs):
            return None
        if _asks(self.config, kwargs, "output_hidden_states"):  # Hooks of the layers record them.
            return None
        visible = None
        if mask is not None:
            visible = _visible(mask)
            if visible is None:
                return None
            visible = visible.expand(x.size(0), -1)
        layers: Any = self.layer
        attentions = [layer.attention.self for layer in layers]
        if not all(isinstance(a, ElectraSelfAttention) for a in attentions):
            return None
        if not all(a.covers_sequences() for a in attentions):
            return None
        states = self.inference.run(self, _no_table, x, visible)
        return None if states is None else states[-1]


def is_plain(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the arguments beside states and mask ask for nothing but the states."""
    if _asks(config, kwargs, "output_attentions"):
        return False
    return all(name in _INERT or _is_off(value) for name, value in kwargs.items())


def _asks(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    """Whether a call asks for an output, by argument or by config, as transformers reads them."""
    value = kwargs.get(name, getattr(config, name, False))
    return value is not None and value is not False


def _is_off(value: Any) -> bool:
    # transformers 4.57 passes a list of no head masks.
    parts = value if isinstance(value, (list, tuple)) else (value,)
    return all(part is None or part is False for part in parts)


def _of_keys(mask: Any) -> Any:
    """A mask that is the same for every query as [B, 1, 1, L], None where it hides nothing.

    Other masks are returned as they are.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.size(1) != 1 or mask.requires_grad:
        return mask
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # Values cannot be read.
        return mask
    keys = mask[:, :, :1]
    if mask.stride(2) != 0 and not torch.equal(mask, keys.expand_as(mask)):
        return mask
    shows = keys if keys.dtype == torch.bool else keys == 0
    return None if shows.all() else keys


def _visible(mask: Any) -> Tensor | None:
    """The keys [B, L] that a mask [B, 1, 1, L] lets through; None where it does otherwise."""
    if not isinstance(mask, Tensor) or mask.shape[1:-1] != (1, 1):
        return None
    keys = mask[:, 0, 0]
    if keys.dtype == torch.bool:
        return keys
    visible = keys == 0
    hidden = keys <= torch.finfo(keys.dtype).min / 2
    return visible if (visible | hidden).all() else None


def _no_table() -> None:
    return None
