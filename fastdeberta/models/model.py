"""Model: a backbone and one head, with transformers' calling convention."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import generation
from .config import Config
from .encoded import Encoded, ModelOutput, Targets, first_places
from .encoder import Backbone, initialize
from .heads import HEADS


class Model(nn.Module):
    """A DeBERTa (v1, v2, v3) or ELECTRA encoder with one head.

    Args:
        config: which family, which size.
        head: "base"; "mlm" (masked language model, below it the enhanced mask decoder if the
            config has emd); "rtd" (replaced token detection); "causal" (language model that reads
            from left to right, see `generate`); "sequence" (classification; regression when the
            config has one label); "token" (tagging); "span" (extractive question answering);
            "choice" (multiple choice); "entity" (which of a text's entities answers).

    Raises:
        ValueError: unknown head.

    Source: transformers' Deberta, DebertaV2 and Electra models; RTD head of DeBERTaV3 and mask
    decoder: microsoft/DeBERTa.
    """

    def __init__(self, config: Config, head: str = "base"):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}")
        if head != "mlm" and config.emd:  # The decoder is the masked language model's.
            config = replace(config, emd=False)
        if head == "causal" and not config.is_decoder:
            config = replace(config, is_decoder=True)
        self.config = config
        self.head_name = head
        self.backbone = Backbone(config)
        self.head = HEADS[head](config)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        is_impossible: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_choices: int | None = None,
        causal: bool | None = None,
        answer_mask: Tensor | None = None,
        entity_spans: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        first_only: bool = False,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: int64 [B, L]; or packed [T] with `cu_seqlens`. choice: [B, C, L].
            attention_mask: like input_ids, nonzero = a real token. None: all are.
            labels: mlm, token: int64 like input_ids, -100 = not scored. causal: the same, each
                scored by what the token before it gives. rtd: like input_ids, 1 = replaced, scored
                where attention_mask is nonzero. sequence: [B] classes, or floats when the config
                has one label. choice: [B] options. entity: [B, E], 1 = answers.
            start_positions, end_positions: span: int64 [B], the answer's first and last token, both
                0 for none; not scored past the sequence's end.
            is_impossible: span: [B], 1 = the text does not hold the answer. None: where
                start_positions is 0.
            cu_seqlens, max_seqlen: packed sequences, see `disentangled_attention`.
            num_choices: options of a question, for packed sequences.
            causal: attend to earlier tokens only; None: if the config's is_decoder says so.
            answer_mask: span with a beam: like input_ids, nonzero = may be an answer's first or
                last token. None: a row's second segment, or all of a row that has one segment.
                Each row's first token, which stands for no answer, always may.
            entity_spans: entity: int64 [B, E, 2], each entity's first token and the one after its
                last. Spans without a token, such as (-1, -1), are padding.
            output_attentions: also return probabilities; holds [B, H, L, L] for every layer.
            first_only: sequence, choice: of the last layer finish each sequence's first token,
                which is all that these heads read. No sequence may be empty.

        Raises:
            ValueError: ids outside the vocabulary, too long a sequence, wrong combination.
        """
        targets = Targets(labels, start_positions, end_positions, is_impossible)
        if self.head is None and any(x is not None for x in vars(targets).values()):
            raise ValueError("labels: a model without a head (head='base') has no loss")
        if self.head_name == "choice" and cu_seqlens is None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None:
                if given.dim() != (3 if inputs_embeds is None else 4):
                    raise ValueError(
                        f"input_ids must be [B, C, L] for a choice head, got {list(given.shape)}"
                    )
                num_choices = given.size(1)
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = (
                None if x is None else x.flatten(0, 1)
                for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
            )
        rows = None
        if first_only:
            if self.head_name not in ("sequence", "choice") or output_hidden_states:
                raise ValueError(
                    "first_only is for the heads sequence and choice, without "
                    f"output_hidden_states; the head is {self.head_name!r}"
                )
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None:
                rows = _first_rows(given, attention_mask, cu_seqlens)
        attentions: list[Tensor] | None = [] if output_attentions else None
        states = self.backbone(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            cu_seqlens,
            max_seqlen,
            causal,
            attentions,
            rows,
        )
        output = ModelOutput(
            states[-1],
            hidden_states=list(states) if output_hidden_states else None,
            attentions=attentions,
        )
        if self.head is not None:
            table = self.backbone.embeddings.word_embeddings.weight
            encoded = Encoded(
                states[-1],
                table,
                attention_mask,
                cu_seqlens if rows is None else None,
                num_choices,
                max_seqlen,
                token_type_ids,
                answer_mask,
                entity_spans,
            )
            self.head.fill(output, encoded, targets)
        return output

    generate = generation.generate

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters, with or without the token, position and type tables."""
        tables = {
            id(part.weight)
            for part in self.backbone.embeddings.modules()
            if isinstance(part, nn.Embedding)
        }
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)

    def save_pretrained(
        self, directory: str | Path, max_shard_size: int | str | None = None
    ) -> None:
        """Writes config.json and model.safetensors in transformers' layout, as a whole.

        Weights larger than `max_shard_size` (bytes, or as "2GB"; None: no limit) are sharded.
        """
        from .checkpoint import save

        save(self, directory, max_shard_size)


def _first_rows(given: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Of the flattened batch each sequence's first token, int64 [B]."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1].long()
    starts = torch.arange(len(given), device=given.device) * given.size(1)
    return starts if mask is None else starts + first_places(mask)
