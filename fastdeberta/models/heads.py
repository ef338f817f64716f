"""Heads: an encoded batch -> logits and loss. Parameter names end as checkpoints' do.

HEADS is the registry: a name that users type -> the class for a config's family.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .answers import BeamSpanHead, EntityHead, SpanHead
from .config import Config
from .encoded import Encoded, Head, ModelOutput, Targets
from .encoder import activation


class MaskedLMHead(Head):
    """Transform, then the product with the token table, which is the head's output matrix."""

    def __init__(self, config: Config):
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        # ELECTRA's generator head is always gelu, whatever hidden_act says.
        self.act = activation("gelu" if config.model_type == "electra" else config.hidden_act)

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """[..., hidden], [vocab, embedding_size] -> [..., vocab]."""
        x = self.LayerNorm(self.act(self.dense(hidden)))
        return nn.functional.linear(x, word_embeddings, self.bias)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        output.logits = self(encoded.hidden, encoded.table)
        if targets.labels is not None:
            logits = output.logits.float().flatten(0, -2)
            output.loss = cross_entropy(logits, targets.labels.flatten())


class CausalLMHead(MaskedLMHead):
    """The masked language model's head, each token's logits for the one that follows it."""

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        output.logits = self(encoded.hidden, encoded.table)
        if targets.labels is None:
            return
        labels = targets.labels.roll(-1, -1)
        last: Tensor | slice = slice(-1, None)  # Nothing follows a sequence's last token.
        if encoded.cu_seqlens is not None:
            last = encoded.cu_seqlens[1:].long() - 1
        labels[..., last] = -100
        if encoded.mask is not None:
            labels = labels.masked_fill(~encoded.mask.bool(), -100)
        output.loss = cross_entropy(output.logits.float().flatten(0, -2), labels.flatten())


class ReplacedTokenHead(Head):
    """One logit a token: was it replaced?

    ELECTRA: dense -> act -> linear. DeBERTaV3 first normalises the token's state plus the first
    token's.
    """

    def __init__(self, config: Config):
        super().__init__()
        hidden = config.hidden_size
        self.LayerNorm: nn.LayerNorm | None = None
        if config.model_type != "electra":
            self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dense = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, 1)
        self.act = activation(config.hidden_act)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        x = encoded.hidden
        if self.LayerNorm is not None:
            x = self.LayerNorm(x + encoded.first_of_each)
        logits = output.logits = self.classifier(self.act(self.dense(x))).squeeze(-1)
        if targets.labels is not None:
            labels = targets.labels
            if encoded.mask is not None:
                scored = encoded.mask.bool()
                logits, labels = logits[scored], labels[scored]
            output.loss = binary_cross_entropy_with_logits(logits.float(), labels.float())


class Pooler(nn.Module):
    """dropout -> dense -> activation on the first token's state."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.pooler_dropout)
        self.act = activation(config.pooler_hidden_act)

    def forward(self, first: Tensor) -> Tensor:
        return self.act(self.dense(self.dropout(first)))


class SequenceHead(Head):
    """Class (or regression) logits from the first token, as in DeBERTa's checkpoints."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.pooler = Pooler(config)
        rate = config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] -> [B, num_labels]."""
        return self.classifier(self.dropout(self.pooler(first)))

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        output.logits = self(encoded.first)
        if targets.labels is not None:
            output.loss = _classification_loss(output.logits, targets.labels, self.config)


class ElectraSequenceHead(SequenceHead):
    """Class (or regression) logits from the first token, as transformers' ELECTRA has them."""

    def __init__(self, config: Config):
        Head.__init__(self)
        self.config = config
        self.dropout = nn.Dropout(_electra_dropout(config))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] -> [B, num_labels]."""
        x = nn.functional.gelu(self.dense(self.dropout(first)))
        return self.out_proj(self.dropout(x))


class LinearSequenceHead(SequenceHead):
    """Dropout and one linear layer on the first token, as Google's ELECTRA has them."""

    def __init__(self, config: Config):
        Head.__init__(self)
        self.config = config
        self.dropout = nn.Dropout(_electra_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] -> [B, num_labels]."""
        return self.classifier(self.dropout(first))


class TokenHead(Head):
    """Class logits of every token; labels of -100 are not scored."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = nn.Dropout(_electra_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        logits = output.logits = self.classifier(self.dropout(encoded.hidden))
        if targets.labels is not None:
            output.loss = cross_entropy(logits.float().flatten(0, -2), targets.labels.flatten())


class ChoiceHead(Head):
    """One logit an option, from its first token; the loss is over a question's options."""

    def __init__(self, config: Config):
        super().__init__()
        self.pooler = Pooler(config)
        rate = config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, first: Tensor) -> Tensor:
        """[B * C, hidden] -> [B * C, 1]."""
        return self.classifier(self.dropout(self.pooler(first)))

    def fill(self, output: ModelOutput, encoded: Encoded, targets: Targets) -> None:
        choices = encoded.choices
        if choices is None:
            raise ValueError(
                "num_choices must be given with cu_seqlens: rows of one question follow one another"
            )
        output.logits = self(encoded.first).view(-1, choices)
        if targets.labels is not None:
            output.loss = cross_entropy(output.logits.float(), targets.labels)


class ElectraChoiceHead(ChoiceHead):
    """As transformers' ELECTRA has it: dense, activation, dropout, linear."""

    def __init__(self, config: Config):
        Head.__init__(self)
        kind = config.extra.get("summary_type", "first")
        if kind != "first" or not config.extra.get("summary_use_proj", True):
            raise ValueError(
                f"summary_type must be 'first', with a projection, for a choice head; got {kind!r}"
            )
        self.summary = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = activation(config.summary_activation)
        self.dropout = nn.Dropout(config.summary_last_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(self, first: Tensor) -> Tensor:
        """[B * C, hidden] -> [B * C, 1]."""
        return self.classifier(self.dropout(self.act(self.summary(first))))


def _electra_dropout(config: Config) -> float:
    rate = config.classifier_dropout
    return config.hidden_dropout_prob if rate is None else rate


def _classification_loss(logits: Tensor, labels: Tensor, config: Config) -> Tensor:
    logits = logits.float()
    if config.problem_type == "multi_label_classification":
        return binary_cross_entropy_with_logits(logits, labels.float())
    if config.num_labels == 1:
        return nn.functional.mse_loss(logits.squeeze(-1), labels.float())
    return cross_entropy(logits, labels)


def _sequence(config: Config) -> Head:
    if config.sequence_head == "linear":
        return LinearSequenceHead(config)
    return (ElectraSequenceHead if config.model_type == "electra" else SequenceHead)(config)


def _choice(config: Config) -> Head:
    return (ElectraChoiceHead if config.model_type == "electra" else ChoiceHead)(config)


def _span(config: Config) -> Head:
    return (BeamSpanHead if config.span_head == "beam" else SpanHead)(config)


HEADS: dict[str, Callable[[Config], Head | None]] = {
    "base": lambda config: None,
    "mlm": MaskedLMHead,
    "rtd": ReplacedTokenHead,
    "causal": CausalLMHead,
    "sequence": _sequence,
    "token": TokenHead,
    "span": _span,
    "choice": _choice,
    "entity": EntityHead,
}
