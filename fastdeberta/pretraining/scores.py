"""Scores on held-out text."""

import math

import torch
from torch import Tensor


def scores(observed: dict[str, Tensor]) -> dict[str, float]:
    """Scores of an objective's observations over all held-out text.

    Means of every loss and accuracy; for each X_loss of a language model also X_perplexity, its
    exponential, which of a masked model is no perplexity in the strict sense. rtd_logit and
    replaced become rtd_auc and `rtd_accuracies`. What has no observation has no score.
    """
    result = {}
    for name, values in observed.items():
        if name in ("rtd_logit", "replaced") or not len(values):
            continue
        result[name] = float(values.double().mean())
        if name.endswith("_loss") and name != "rtd_loss":
            result[name.removesuffix("loss") + "perplexity"] = math.exp(min(result[name], 700.0))
    if "rtd_logit" in observed:
        logits, replaced = observed["rtd_logit"], observed["replaced"]
        result |= rtd_accuracies(logits, replaced)
        if 0 < int(replaced.sum()) < len(replaced):
            result["rtd_auc"] = auc(logits, replaced)
    return result


def rtd_accuracies(logits: Tensor, replaced: Tensor) -> dict[str, float]:
    """Accuracy on replaced and on original tokens when as many are flagged as were replaced.

    A discriminator that knows nothing scores `replaced_fraction` on replaced tokens and
    1 - `replaced_fraction` on original ones.

    Args:
        logits: [N], higher = more likely replaced. replaced: bool [N].
    """
    count = int(replaced.sum())
    flagged = torch.zeros_like(replaced)
    flagged[logits.topk(count).indices] = True
    result = {"replaced_fraction": count / replaced.numel()}
    if count:
        result["rtd_accuracy_replaced"] = float(flagged[replaced].float().mean())
    if count < replaced.numel():
        result["rtd_accuracy_original"] = float((~flagged)[~replaced].float().mean())
    return result


def auc(logits: Tensor, replaced: Tensor) -> float:
    """The probability that a replaced token's logit is above an original one's; of ties, half."""
    values, place = logits.double().unique(return_inverse=True)
    positive = torch.bincount(place[replaced], minlength=len(values)).double()
    negative = torch.bincount(place[~replaced], minlength=len(values)).double()
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2)).sum() / positive.sum() / negative.sum())
