"""Predictions: what a checkpoint's head says of rows of data, in packed batches."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import tokenizer as tokenizers
from ..models import Config, Model, ModelOutput, from_pretrained, layouts
from ..models.checkpoint import local_directory
from ..models.encoded import SpanBeam
from ..training.distributed import to_device
from .examples import ChoiceExample, SpanExample, TaggedExample, TextExample
from .features import Batch, Features, batches, framed, sentences, token_ids, truncate
from .objectives import objective_for
from .spans import THRESHOLD, SpanDecoder
from .windows import windows

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Batches are filled up to a multiple of so many tokens.
_ROUND = 256

# Tokens of a question to a text, at most; fewer where windows are short.
_QUERY_LENGTH = 64

# The words of a text that is to be tagged: as in treebanks, a punctuation mark is one of its own.
_WORD = re.compile(r"\w+|[^\w\s]")


class Predictor:
    """One head's way from rows to results.

    Args:
        model: with the head; is put into eval mode.
        max_length: tokens of a sequence; None: the config's max_position_embeddings.
        tokens: of a batch, unless one sequence alone has more.
        text, beside: names of the row's keys, of which it must have one; `beside` is a pair's
            second text, the question or the options. None: the head's own.

    Attributes:
        directory: the checkpoint's, if it was loaded from one.

    Raises:
        ValueError: sizes that are too small, or longer than the model's table of positions.
    """

    TEXT: ClassVar[tuple[str, ...]] = ("text",)
    BESIDE: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        max_length: int | None = None,
        tokens: int = 4096,
        text: str | None = None,
        beside: str | None = None,
    ):
        self.directory: Path | None = None
        self.model, self.tokenizer = model.eval(), tokenizer
        self.objective = objective_for(model)
        self.max_length, self.tokens = _checked_length(model, max_length), tokens
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.text = self.TEXT if text is None else (text,)
        self.beside = self.BESIDE if beside is None else (beside,)
        self.labels = [label for _, label in sorted(model.config.id2label.items())]

    def read(self, row: Mapping[str, Any]) -> Any:
        """One row's example.

        Raises:
            ValueError: a key is missing, or its value is of another type.
        """
        raise NotImplementedError

    def predict(self, examples: Sequence[Any]) -> "list[dict[str, Any] | ValueError]":
        """One result an example, in their order; an error where the model gives no number."""
        results: list[dict[str, Any] | ValueError] = []
        with torch.inference_mode():
            for result in self.results(examples) if examples else ():
                results.append(result if _finite(result) else ValueError("the model gives NaN"))
        return results

    def results(self, examples: Sequence[Any]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def run(self, features: Features) -> Iterator[tuple[list[int], Batch, ModelOutput]]:
        """Batches of all rows: their numbers, what the model read, and what it says."""
        device = next(self.model.parameters()).device
        for rows in batches(features, self.tokens):
            batch = features.batch(rows)
            moved = to_device(_rounded(batch, self.max_length), device)
            yield rows, batch, self._outputs(moved, len(rows))

    def _outputs(self, batch: Batch, count: int) -> ModelOutput:
        """The model's output for the first `count` sequences."""
        output = self.objective.run(batch)
        for name in ("logits", "start_logits", "end_logits", "impossible_logits"):
            value = getattr(output, name)
            if value is not None and self.model.head_name != "token":
                setattr(output, name, value[:count])
        if output.beam is not None:
            parts = vars(output.beam).items()
            output.beam = SpanBeam(**{name: value[:count] for name, value in parts})
        return output

    def framed(self, pairs: Sequence[tuple[str, str | None]]) -> tuple[Features, list[bool]]:
        """Texts and pairs as sequences, and which of them were cut."""
        firsts = token_ids(self.tokenizer, [first for first, _ in pairs])
        seconds = token_ids(self.tokenizer, [second for _, second in pairs if second is not None])
        sequences, cut = [], []
        for first, (_, pair) in zip(firsts, pairs, strict=True):
            second = None if pair is None else next(seconds)
            kept = truncate(first, second, self.max_length)
            sequences.append(framed(self.tokenizer, *kept))
            tokens = [len(side) for side in (first, second, *kept) if side is not None]
            half = len(tokens) // 2
            cut.append(tokens[:half] != tokens[half:])
        return Features.of(sequences), cut


class SequencePredictor(Predictor):
    """{"text"}, and "pair" or "text_pair" -> a class's "label" and "score", and all "scores".

    Regression gives "score" alone; several labels at once give "labels", those of at least 0.5,
    and "scores".
    """

    BESIDE = ("pair", "text_pair")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.needs_pair = self.beside != self.BESIDE
        kind = self.model.config.problem_type
        self.kind = kind or ("regression" if len(self.labels) == 1 else "classification")

    def read(self, row: Mapping[str, Any]) -> TextExample:
        text, pair = _string(row, self.text), None
        if self.needs_pair or any(row.get(name) is not None for name in self.beside):
            pair = _string(row, self.beside)
        return TextExample("", text, pair)

    def results(self, examples: Sequence[TextExample]) -> Iterator[dict[str, Any]]:
        features, cut = self.framed([(example.text, example.pair) for example in examples])
        logits = torch.empty(len(features), len(self.labels))
        for rows, _, output in self.run(features):
            assert output.logits is not None
            logits[rows] = output.logits.float().cpu()
        scores = logits
        if self.kind == "multi_label_classification":
            scores = logits.sigmoid()
        elif self.kind != "regression":
            scores = logits.softmax(-1)
        for values, was_cut in zip(scores.tolist(), cut, strict=True):
            yield self._result(values) | _truncated(was_cut)

    def _result(self, values: list[float]) -> dict[str, Any]:
        scores = {name: _short(x) for name, x in zip(self.labels, values, strict=True)}
        if self.kind == "regression":
            return {"score": _short(values[0])} if len(values) == 1 else {"scores": scores}
        if self.kind == "multi_label_classification":
            return {"labels": [name for name, x in scores.items() if x >= 0.5], "scores": scores}
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores}


class TokenPredictor(Predictor):
    """{"words"}, or {"text"} -> "tags" and "scores", one for each word; of a text also "words"
    and their "offsets", [start, end) in characters.

    A text's words are its runs of letters and digits, and every other mark. Words beyond
    max_length, and those that the tokenizer drops, have null.
    """

    def read(self, row: Mapping[str, Any]) -> TaggedExample | str:
        words = row.get("words")
        if words is None:
            return _string(row, (*self.text, "words"))
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("'words' must be a list of strings")
        return TaggedExample("", tuple(_encodable("words", word) for word in words))

    def results(self, examples: Sequence[TaggedExample | str]) -> Iterator[dict[str, Any]]:
        found: list[list[re.Match] | None] = []
        tagged = []
        for example in examples:
            matches = None
            if isinstance(example, str):
                matches = list(_WORD.finditer(example))
                example = TaggedExample("", tuple(match[0] for match in matches))
            found.append(matches)
            tagged.append(example)
        features = sentences(self.tokenizer, tagged, None, self.max_length)
        assert features.words is not None
        tags: list[list[str | None]] = [[None] * len(example.words) for example in tagged]
        scores: list[list[float | None]] = [[None] * len(example.words) for example in tagged]
        for rows, batch, output in self.run(features):
            assert output.logits is not None
            logits = output.logits[batch.targets["places"].to(output.logits.device)]
            best = iter(zip(*(x.tolist() for x in logits.float().softmax(-1).max(-1)), strict=True))
            for row in rows:
                for word in features.words[row].tolist():
                    score, label = next(best)
                    tags[row][word], scores[row][word] = self.labels[label], _short(score)
        lengths = features.lengths.tolist()
        for i, matches in enumerate(found):
            result: dict[str, Any] = {"tags": tags[i], "scores": scores[i]}
            if matches is not None:
                result["words"] = list(tagged[i].words)
                result["offsets"] = [list(match.span()) for match in matches]
            full = lengths[i] == self.max_length
            yield result | _truncated(full and tags[i][-1:] == [None])


class ChoicePredictor(Predictor):
    """{"text", "options" (or "choices")} -> the best one's number as "label", its "score", and all
    "scores"."""

    BESIDE = ("options", "choices")

    def read(self, row: Mapping[str, Any]) -> ChoiceExample:
        text, name = _string(row, self.text), _key(row, self.beside)
        options = row[name]
        if not (options and isinstance(options, list) and all(isinstance(o, str) for o in options)):
            raise ValueError(f"{name!r} must be a list of strings, at least one")
        return ChoiceExample("", text, tuple(_encodable(name, option) for option in options))

    def results(self, examples: Sequence[ChoiceExample]) -> Iterator[dict[str, Any]]:
        features, cut = self.framed([(e.text, option) for e in examples for option in e.options])
        # Each as a question with one option, so that batches need not hold whole ones.
        features = replace(features, options=torch.ones(len(features), dtype=torch.long))
        logits = torch.empty(len(features))
        for rows, _, output in self.run(features):
            assert output.logits is not None
            logits[rows] = output.logits.float().squeeze(-1).cpu()
        begin = 0
        for example in examples:
            end = begin + len(example.options)
            scores = logits[begin:end].softmax(-1)
            label = int(scores.argmax())
            values = [_short(x) for x in scores.tolist()]
            result = {"label": label, "score": values[label], "scores": values}
            yield result | _truncated(any(cut[begin:end]))
            begin = end


class SpanPredictor(Predictor):
    """{"question", "text" (or "context")} -> the best "answer" with its "start" and "end" in
    characters of the text, "score", its probability among the 20 best, and "no_answer".

    A text that is too long is read in overlapping windows, and none of it is left out. The higher
    no_answer is, the less the text seems to hold an answer (see SpanPrediction); there is no such
    key where the head does not judge it. Above the config's no_answer_threshold, which a model that
    was fine-tuned for SQuAD 2.0 has, the answer is "", as is that of a text without words.
    """

    TEXT = ("text", "context")
    BESIDE = ("question",)

    def read(self, row: Mapping[str, Any]) -> SpanExample:
        return SpanExample("", _string(row, self.beside), _string(row, self.text))

    def results(self, examples: Sequence[SpanExample]) -> Iterator[dict[str, Any]]:
        query_length = min(_QUERY_LENGTH, max(1, self.max_length // 2 - 4))
        features = windows(
            self.tokenizer, examples, False, self.max_length, max_query_length=query_length
        )
        decoder, broken = SpanDecoder(), set()
        for rows, _, output in self.run(features):
            chosen = [features.windows[row] for row in rows]
            decoder.add(chosen, output)
            assert output.start_logits is not None
            for window, finite in zip(
                chosen, output.start_logits.isfinite().all(-1).tolist(), strict=True
            ):
                if not finite:
                    broken.add(window.example)
        predictions = decoder.predictions([example.text for example in examples])
        threshold = self.model.config.extra.get(THRESHOLD, math.inf)
        for i, prediction in enumerate(predictions):
            result: dict[str, Any] = {"answer": "", "start": 0, "end": 0, "score": 0.0}
            if i in broken:
                result["score"] = math.nan
            elif prediction.answer(threshold):
                best = prediction.spans[0]
                score = _short(best.probability)
                result = {"answer": best.text, "start": best.start, "end": best.end, "score": score}
            if math.isfinite(prediction.no_answer):
                result["no_answer"] = _short(prediction.no_answer)
            yield result


PREDICTORS: dict[str, type[Predictor]] = {
    "sequence": SequencePredictor,
    "token": TokenPredictor,
    "choice": ChoicePredictor,
    "span": SpanPredictor,
}


def load(
    path_or_hub_id: str | Path,
    head: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    **options: Any,
) -> Predictor:
    """The predictor of a checkpoint with its tokenizer.

    Args:
        head: sequence, token, choice or span; None: the one that config.json's `architectures`
            names.
        precision: "fp32" or "bf16", of weights and products.
        device: None: cuda where there is one, else cpu.
        options: see Predictor.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, no known head in it, damaged files.
    """
    directory = local_directory(path_or_hub_id)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    known = ", ".join(PREDICTORS)
    if head is None:
        head = layouts.named_head(Config.load(directory))
        if head not in PREDICTORS:
            named = "no head that is known" if head is None else f"the head {head!r}"
            raise ValueError(
                f"{directory / 'config.json'} names {named}; --head says which it is: {known}"
            )
    if head not in PREDICTORS:
        raise ValueError(f"head must be one of {known}; got {head!r}")
    model = from_pretrained(directory, head).to(dtype=PRECISIONS[precision])
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = PREDICTORS[head](model.to(device), tokenizers.load(directory), **options)
    predictor.directory = directory
    return predictor


def _rounded(batch: Batch, longest: int) -> Batch:
    """The batch with sequences of zeros behind it, which make it a multiple of _ROUND tokens.

    oneDNN keeps what it compiles for each number of rows: memory would grow with their variety.
    """
    size = len(batch.input_ids)
    more = -size % _ROUND
    if not more:
        return batch
    assert batch.cu_seqlens is not None and batch.max_seqlen is not None
    ends = torch.tensor([*range(size + longest, size + more, longest), size + more])
    return batch._replace(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, more)),
        token_type_ids=torch.nn.functional.pad(batch.token_type_ids, (0, more)),
        cu_seqlens=torch.cat([batch.cu_seqlens, ends.int()]),
        max_seqlen=max(batch.max_seqlen, min(more, longest)),
    )


def _checked_length(model: Model, max_length: int | None) -> int:
    limit = model.config.max_position_embeddings
    if max_length is None:
        return limit
    if max_length < 4:
        raise ValueError(f"max_length must be at least 4, got {max_length}")
    if model.backbone.embeddings.position_embeddings is not None and max_length > limit:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {limit}, "
            f"got {max_length}"
        )
    return max_length


def _key(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the names that the row has a value for."""
    for name in names:
        if row.get(name) is not None:
            return name
    raise ValueError(f"no {' or '.join(map(repr, names))}; it has {', '.join(row) or 'no key'}")


def _string(row: Mapping[str, Any], names: Sequence[str]) -> str:
    name = _key(row, names)
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} must be a string, got {json.dumps(row[name])[:40]}")
    return _encodable(name, row[name])


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half of a surrogate pair, which is no text") from None
    return text


def _short(x: float) -> float:
    """To six digits, which is what float32 has."""
    return float(f"{x:.6g}")


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _truncated(cut: bool) -> dict[str, bool]:
    return {"truncated": True} if cut else {}
