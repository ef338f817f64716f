"""Heads: hidden states [..., L, hidden] -> logits. Parameter names end as checkpoints' do."""

import torch
from torch import Tensor, nn

from .config import Config
from .encoder import activation


class MaskedLMHead(nn.Module):
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


class ReplacedTokenHead(nn.Module):
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

    def forward(self, hidden: Tensor, first: Tensor) -> Tensor:
        """[..., L, hidden] and the first token's state broadcast to it -> [..., L]."""
        x = hidden if self.LayerNorm is None else self.LayerNorm(hidden + first)
        return self.classifier(self.act(self.dense(x))).squeeze(-1)


class Pooler(nn.Module):
    """dropout -> dense -> activation on the first token's state."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.pooler_dropout)
        self.act = activation(config.pooler_hidden_act)

    def forward(self, first: Tensor) -> Tensor:
        return self.act(self.dense(self.dropout(first)))


class SequenceHead(nn.Module):
    """Class (or regression) logits from the first token, as in DeBERTa's checkpoints."""

    def __init__(self, config: Config):
        super().__init__()
        self.pooler = Pooler(config)
        rate = config.hidden_dropout_prob if config.cls_dropout is None else config.cls_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] -> [B, num_labels]."""
        return self.classifier(self.dropout(self.pooler(first)))


class ElectraSequenceHead(nn.Module):
    """Class (or regression) logits from the first token, as transformers' ELECTRA has them."""

    def __init__(self, config: Config):
        super().__init__()
        rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B, hidden] -> [B, num_labels]."""
        x = nn.functional.gelu(self.dense(self.dropout(first)))
        return self.out_proj(self.dropout(x))
