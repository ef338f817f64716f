"""Replaced token detection: the task, its scores, and the run from text to models."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import tokenizer as tokenizers
from ..files import write_atomically
from ..training.checkpoint import checkpoints
from ..training.optimizer import parameter_groups
from ..training.reporting import Progress
from ..training.trainer import Trainer, epoch_rows
from . import text
from .pair import Pair
from .settings import PretrainSettings


class Batch(NamedTuple):
    """input_ids: int64 [B, L]. attention_mask: bool [B, L], or None without padding."""

    input_ids: Tensor
    attention_mask: Tensor | None


class Corpus(NamedTuple):
    """A tokenizer, and packed rows of its tokens: int64 [rows, L]."""

    tokenizer: Any
    train: Tensor
    held_out: Tensor


def load_corpus(settings: PretrainSettings) -> Corpus:
    """Reads, splits, tokenises and packs the text.

    A run that continues uses the tokenizer that it keeps in its output directory.

    Raises:
        FileNotFoundError, ValueError: see `text.read_documents` and `tokenizers.load`.
    """
    documents = text.read_documents(settings.data)
    if len(documents) < 2:
        raise ValueError(
            f"data: {settings.data} holds one document; at least two are needed, one to hold out"
        )
    train, held_out = text.split(documents, settings.held_out, settings.seed)
    output = Path(settings.output)
    if not (checkpoints(output) and (output / tokenizers.FILE).exists()):
        # A tokenizer without a checkpoint is of a run that failed, maybe for its settings.
        if settings.tokenizer is not None:
            tokenizer = tokenizers.load(settings.tokenizer)
        else:
            tokenizer = tokenizers.train(
                train, settings.vocab_size, settings.lowercase, settings.tokenizer_kind
            )
        tokenizers.save(tokenizer, output)
    # As read back: a file rounds scores, and a run that continues must see the same tokens.
    tokenizer = tokenizers.load(output)
    length = settings.sequence_length
    return Corpus(
        tokenizer, text.pack(tokenizer, train, length), text.pack(tokenizer, held_out, length)
    )


class ReplacedTokenDetection:
    """The task that `Trainer` runs: a pair, its data and its scores.

    Source: ELECTRA, section 3; DeBERTaV3, section 3.
    """

    title = "pre-training"

    def __init__(self, settings: PretrainSettings, corpus: Corpus):
        self.settings = settings
        self.corpus = corpus
        special = {t: tokenizers.special_id(corpus.tokenizer, t) for t in tokenizers.SPECIAL_TOKENS}
        self.pad_id = special[tokenizers.PAD]
        generator, discriminator = settings.configs(corpus.tokenizer.get_vocab_size(), self.pad_id)
        torch.manual_seed(settings.seed)
        self.pair = Pair(
            generator,
            discriminator,
            settings.tie,
            mask_id=special[tokenizers.MASK],
            special_ids=sorted(set(special.values()) - {special[tokenizers.UNK]}),
            mask_fraction=settings.mask_fraction,
            temperature=settings.temperature,
        )
        self.model: nn.Module = self.pair

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The generator's (shared tables among them) and the discriminator's own parameters."""
        rate = self.settings.generator_learning_rate or self.settings.learning_rate
        generator = list(self.pair.generator.parameters())
        shared = {id(p) for p in generator}
        own = [p for p in self.pair.discriminator.parameters() if id(p) not in shared]
        decay = self.settings.weight_decay
        return [
            *parameter_groups(generator, rate, decay, "generator"),
            *parameter_groups(own, self.settings.learning_rate, decay, "discriminator"),
        ]

    def batch(self, step: int) -> Batch:
        rows = self.corpus.train
        return self._batch(
            rows[epoch_rows(len(rows), self.settings.batch_size, step, self.settings.seed)]
        )

    def _batch(self, input_ids: Tensor) -> Batch:
        mask = input_ids != self.pad_id
        return Batch(input_ids, None if mask.all() else mask)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.pair.losses(self.pair(*batch))
        values = {
            "mlm_loss": losses.mlm_sum / losses.mlm_count,
            "rtd_loss": losses.rtd_sum / losses.rtd_count,
        }
        return losses.total(self.settings.rtd_weight), values

    def tokens(self, batch: Batch) -> int:
        mask = batch.attention_mask
        return batch.input_ids.numel() if mask is None else int(mask.sum())

    def evaluate(self, batch_size: int = 128) -> dict[str, float]:
        """Held-out scores; see `rtd_accuracies` for those of the discriminator.

        mlm_accuracy, mlm_loss: of the generator, at the chosen positions.
        """
        from sklearn.metrics import roc_auc_score

        device = next(self.pair.parameters()).device
        hits, mlm, chosen = 0, 0.0, 0
        logits, replaced = [], []
        for rows in self.corpus.held_out.split(batch_size):
            input_ids, mask = self._batch(rows.to(device))
            output = self.pair(input_ids, mask)
            picked = output.masked.chosen
            hits += int((output.mlm_logits.argmax(-1) == output.masked.original)[picked].sum())
            losses = self.pair.losses(output)
            mlm, chosen = mlm + float(losses.mlm_sum), chosen + int(losses.mlm_count)
            logits.append(output.rtd_logits[output.scored].float().cpu())
            replaced.append(output.replaced[output.scored].cpu())
        scores, labels = torch.cat(logits), torch.cat(replaced)
        return {
            "mlm_accuracy": hits / chosen,
            "mlm_loss": mlm / chosen,
            "rtd_auc": float(roc_auc_score(labels, scores)),
            **rtd_accuracies(scores, labels),
        }

    def export(self, directory: Path) -> None:
        """Writes `directory`/generator and `directory`/discriminator, each with the tokenizer."""
        models = {
            "generator": self.pair.generator,
            "discriminator": self.pair.export_discriminator(),
        }
        for name, model in models.items():
            (directory / name).mkdir(parents=True, exist_ok=True)
            model.save_pretrained(directory / name)
            tokenizers.save(self.corpus.tokenizer, directory / name)


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
    return {
        "rtd_accuracy_replaced": float(flagged[replaced].float().mean()),
        "rtd_accuracy_original": float((~flagged)[~replaced].float().mean()),
        "replaced_fraction": count / replaced.numel(),
    }


def baselines(corpus: Corpus, special_ids: list[int]) -> dict[str, float]:
    """Held-out masked-token accuracy without a model.

    most_frequent: always the training text's most frequent token. unigram: a draw from its
    token frequencies (the expected accuracy).
    """
    size = corpus.tokenizer.get_vocab_size()
    frequencies = []
    for rows in (corpus.train, corpus.held_out):
        counts = torch.bincount(rows.flatten(), minlength=size).double()
        counts[special_ids] = 0
        frequencies.append(counts / counts.sum())
    train, held_out = frequencies
    return {
        "most_frequent": float(held_out[train.argmax()]),
        "unigram": float((train * held_out).sum()),
    }


def pretrain(settings: PretrainSettings, progress: Progress | None = None) -> dict[str, Any]:
    """From text to a generator and a discriminator in `settings.output`; resumes by itself.

    Returns:
        The final scores, as written to metrics.json.

    Raises:
        FileNotFoundError, ValueError: bad settings or data. Interrupted, Diverged: see Trainer.
    """
    task = ReplacedTokenDetection(settings, load_corpus(settings))
    result = Trainer(task, settings, progress).run()
    task.export(Path(settings.output))
    specials = [tokenizers.special_id(task.corpus.tokenizer, t) for t in tokenizers.SPECIAL_TOKENS]
    result = {
        **result,
        "baseline": baselines(task.corpus, specials),
        "parameters": {
            name: {
                "total": model.num_parameters(),
                "without_embeddings": model.num_parameters(False),
            }
            for name, model in (
                ("generator", task.pair.generator),
                ("discriminator", task.pair.export_discriminator()),
            )
        },
    }
    write_atomically(Path(settings.output) / "metrics.json", json.dumps(result, indent=2) + "\n")
    return result
