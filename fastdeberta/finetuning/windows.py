"""Windows: a question with the parts of a text that is too long for one sequence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .examples import SpanExample
from .features import Features, covering, framed, offset_tokens, token_ids
from .spans import Window


def windows(
    tokenizer: Any,
    examples: Sequence[SpanExample],
    training: bool,
    max_length: int,
    stride: int = 128,
    max_query_length: int = 64,
) -> Features:
    """One row, [CLS] question [SEP] part [SEP], for every part of each text.

    Args:
        training: rows have start_positions and end_positions, the first answer's first and last
            token, or 0 where the part does not hold all of it; else they have `windows`.
        stride: tokens from the beginning of one part to that of the next; parts that are shorter
            follow one another without a gap.
        max_query_length: tokens of a question; what is beyond is cut.

    Raises:
        ValueError: max_length leaves no room for the text.

    Source: google-research/bert and electra.
    """
    if stride < 1 or max_query_length < 1:
        raise ValueError(
            f"stride and max_query_length must be at least 1, got {stride} and {max_query_length}"
        )
    if max_length < max_query_length + 4:
        raise ValueError(
            f"max_length must be at least max_query_length + 4 = {max_query_length + 4}, "
            f"got {max_length}"
        )
    sequences, starts, ends, found = [], [], [], []
    questions = token_ids(tokenizer, [example.question for example in examples])
    tokens = offset_tokens(tokenizer, [example.text for example in examples])
    for number, (example, question, (ids, offsets)) in enumerate(
        zip(examples, questions, tokens, strict=True)
    ):
        question = question[:max_query_length]
        room = max_length - 3 - len(question)
        answer = example.answers[0] if training and example.answers else None
        place = None
        if answer is not None:
            place = covering(offsets, answer.start, answer.start + len(answer.text))
        for begin in parts(len(ids), room, stride):
            part = slice(begin, begin + room)
            row, second = framed(tokenizer, question, ids[part])
            sequences.append((row, second))
            if not training:
                of_row = np.full((len(row), 2), -1, np.int64)
                of_row[second : len(row) - 1] = offsets[part]
                found.append(Window(number, torch.from_numpy(of_row)))
                continue
            first = last = 0
            if place is not None and begin <= place[0] and place[1] < begin + room:
                first, last = (token - begin + second for token in place)
            starts.append(first)
            ends.append(last)
    if not training:
        return Features.of(sequences, windows=tuple(found))
    positions = {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    return Features.of(sequences, targets=positions)


def parts(length: int, room: int, stride: int) -> range:
    """Where the parts of a text of `length` tokens begin, each of `room` tokens but the last."""
    step = min(stride, room)
    count = max(0, -(-(length - room) // step))
    return range(0, count * step + 1, step)
