"""What every objective has, and what several of them compute."""

from typing import Any

from torch import Tensor, nn

from ..models import Model
from ..models.heads import MaskedLMHead
from .batches import Batch
from .losses import Reader, linear_cross_entropy


class Objective(nn.Module):
    """What every objective has beside `forward`."""

    def networks(self) -> dict[str, list[nn.Module]]:
        """The modules of each network, by its name; a shared weight is the first one's."""
        raise NotImplementedError

    def models(self) -> dict[str, Model]:
        """The models to export, by their names."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sums of the losses over a batch, float32 scalars."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, float]:
        """How many tokens each sum of `forward` is over."""
        raise NotImplementedError

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """What `scores.scores` takes, of one batch, each [n]."""
        raise NotImplementedError


def token_losses(
    model: Model, batch: Batch, inputs: Tensor, causal: bool = False, read: Reader | None = None
) -> tuple[Tensor, Tensor | None]:
    """-log p of the targets at the batch's positions, float32 [N], and what `read` found."""
    hidden = chosen_states(model, batch, inputs, causal)
    return vocabulary_losses(model, hidden, batch.targets, read)


def chosen_states(model: Model, batch: Batch, inputs: Tensor, causal: bool = False) -> Tensor:
    """The last layer's states at the batch's positions, [N, hidden]."""
    states = model.backbone(
        **model_inputs(batch, inputs), causal=causal or None, rows=batch.positions
    )
    return states[-1]


def vocabulary_losses(
    model: Model,
    hidden: Tensor,
    targets: Tensor,
    read: Reader | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(logits / temperature) of the targets under a model's masked language head."""
    head = model.head
    assert isinstance(head, MaskedLMHead)
    x: Tensor = head.LayerNorm(head.act(head.dense(hidden)))
    bias: Tensor = head.bias
    if temperature != 1.0:
        x, bias = x / temperature, bias / temperature
    table = model.backbone.embeddings.word_embeddings.weight
    return linear_cross_entropy(x, table, bias, targets, read)


def real(batch: Batch) -> Tensor | slice:
    """Which tokens of the flattened batch are not padding."""
    mask = batch.attention_mask
    return slice(None) if mask is None else mask.flatten().bool()


def guess_token(logits: Tensor, rows: slice) -> Tensor:
    return logits.argmax(-1)


def model_inputs(batch: Batch, input_ids: Tensor) -> dict[str, Any]:
    return {
        "input_ids": input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
    }


def token_rows(states: Tensor, batch: Batch) -> Tensor:
    """[B, L, hidden] or [T, hidden] -> [T, hidden]."""
    return states if batch.cu_seqlens is not None else states.flatten(0, 1)


def weighted_sum(losses: Tensor, batch: Batch) -> Tensor:
    return (losses if batch.weights is None else losses * batch.weights).sum()
