"""Model: a backbone and one head, with transformers' calling convention."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .config import Config
from .encoder import Backbone, initialize
from .heads import ElectraSequenceHead, MaskedLMHead, ReplacedTokenHead, SequenceHead

HEADS = ("base", "mlm", "rtd", "sequence")


@dataclass
class ModelOutput:
    """What a model returns; None where it does not apply.

    last_hidden_state: [B, L, hidden] or packed [T, hidden]. In eval mode without gradients, on the
        CPU, rows of padding are zeros; elsewhere they hold no meaning.
    logits: mlm [B, L, vocab]; rtd [B, L]; sequence [B, num_labels].
    loss: scalar, when labels were given.
    hidden_states: embeddings and every layer's output, when asked for.
    """

    last_hidden_state: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    hidden_states: list[Tensor] | None = None


class Model(nn.Module):
    """A DeBERTa-v2/v3 or ELECTRA encoder with one head.

    Args:
        config: which family, which size.
        head: "base", "mlm" (masked language model), "rtd" (replaced token detection) or
            "sequence" (classification; regression when the config has one label).

    Raises:
        ValueError: unknown head.

    Source: transformers' DebertaV2 and Electra models; RTD head of DeBERTaV3: microsoft/DeBERTa.
    """

    def __init__(self, config: Config, head: str = "base"):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}; got {head!r}")
        self.config = config
        self.head_name = head
        self.backbone = Backbone(config)
        self.head: nn.Module | None = None
        if head == "mlm":
            self.head = MaskedLMHead(config)
        elif head == "rtd":
            self.head = ReplacedTokenHead(config)
        elif head == "sequence":
            electra = config.model_type == "electra"
            self.head = ElectraSequenceHead(config) if electra else SequenceHead(config)
        initialize(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool = False,
    ) -> ModelOutput:
        """Runs the model.

        Args:
            input_ids: int64 [B, L]; or packed [T] with `cu_seqlens`.
            attention_mask: like input_ids, nonzero = a real token. None: all are.
            labels: mlm: int64 like input_ids, -100 = not scored. rtd: like input_ids, 1 =
                replaced, scored where attention_mask is nonzero. sequence: [B] classes, or floats
                when the config has one label.
            cu_seqlens, max_seqlen: packed sequences, see `disentangled_attention`.

        Raises:
            ValueError: ids outside the vocabulary, too long a sequence, wrong combination.
        """
        states = self.backbone(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            cu_seqlens,
            max_seqlen,
        )
        hidden = states[-1]
        logits = self._logits(hidden, cu_seqlens)
        loss = None
        if labels is not None:
            if logits is None:
                raise ValueError("labels: a model without a head (head='base') has no loss")
            loss = self._loss(logits, labels, attention_mask)
        return ModelOutput(hidden, logits, loss, list(states) if output_hidden_states else None)

    def _logits(self, hidden: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        if self.head_name == "base":
            return None
        assert self.head is not None
        if self.head_name == "mlm":
            return self.head(hidden, self.backbone.embeddings.word_embeddings.weight)
        first = hidden[:, 0] if cu_seqlens is None else hidden[cu_seqlens[:-1].long()]
        if self.head_name == "sequence":
            return self.head(first)
        if cu_seqlens is None:
            return self.head(hidden, first.unsqueeze(1))
        lengths = cu_seqlens.diff()
        return self.head(hidden, first.repeat_interleave(lengths, 0, output_size=hidden.size(0)))

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.head_name == "mlm":
            return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if self.head_name == "rtd":
            if mask is not None:
                logits, labels = logits[mask.bool()], labels[mask.bool()]
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        if self.config.problem_type == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
        if self.config.num_labels == 1:
            return nn.functional.mse_loss(logits.squeeze(-1), labels.float())
        return nn.functional.cross_entropy(logits, labels)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters, with or without the token, position and type tables."""
        tables = {
            id(part.weight)
            for part in self.backbone.embeddings.modules()
            if isinstance(part, nn.Embedding)
        }
        return sum(p.numel() for p in self.parameters() if embeddings or id(p) not in tables)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in transformers' layout, as a whole."""
        from .checkpoint import save

        save(self, directory)
