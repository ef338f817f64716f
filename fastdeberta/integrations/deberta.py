"""transformers' DeBERTa encoders: positions and masks passed on unbuilt, packed inference.

Classes for `accelerate`, which gives them to encoders that exist; nothing here is constructed.
"""

from typing import Any

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta import modeling_deberta
from transformers.models.deberta_v2 import modeling_deberta_v2

from ..attention import DisentangledAttention
from ..inference import Inference
from ..packing import PaddedStates
from ..relative_position import RelativePosition


class _Encoder:
    """What both encoders do otherwise. Arguments are transformers'."""

    relative_position: RelativePosition | None
    inference: Inference | None

    @staticmethod
    def fits(encoder: Any) -> bool:
        """Whether all attention is ours: another's needs the positions that transformers builds."""
        return len(encoder.layer) > 0 and all(
            isinstance(layer.attention.self, DisentangledAttention) for layer in encoder.layer
        )

    def accelerated(self: Any, backend: str, inference: bool) -> None:
        """Takes the settings; also called again for others."""
        attention = self.layer[0].attention.self
        relative = attention.relative_attention
        self.relative_position = attention.relative_position if relative else None
        self.inference = Inference() if inference else None

    def restored(self: Any) -> None:
        del self.relative_position, self.inference

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None):
        return self.relative_position if relative_pos is None else relative_pos

    def get_attention_mask(self, attention_mask):
        if attention_mask.dim() == 2:
            return attention_mask
        return super().get_attention_mask(attention_mask)  # type: ignore[misc]

    def forward(
        self: Any,
        hidden_states,
        attention_mask,
        output_hidden_states=True,
        output_attentions=False,
        query_states=None,
        relative_pos=None,
        return_dict=True,
    ):
        states = None
        usual = not output_attentions and query_states is None and relative_pos is None
        if usual and self.inference is not None:
            states = self.inference.run(self, self.get_rel_embedding, hidden_states, attention_mask)
        if states is None:
            return super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask,
                output_hidden_states,
                output_attentions,
                query_states,
                relative_pos,
                return_dict,
            )
        last = states[-1]
        # transformers' models ask for all states and use the last: those of padding are put off.
        every: Any = states if isinstance(states, PaddedStates) else tuple(states)
        if not return_dict:
            return (last, every) if output_hidden_states else (last,)
        return BaseModelOutput(
            last_hidden_state=last, hidden_states=every if output_hidden_states else None
        )


class DebertaEncoder(_Encoder, modeling_deberta.DebertaEncoder):
    """v1's."""


class DebertaV2Encoder(_Encoder, modeling_deberta_v2.DebertaV2Encoder):
    """That of v2 and v3."""
