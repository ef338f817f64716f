"""Labelled examples, one type for each kind of head; a field that a file lacks is None."""

from typing import NamedTuple


class TextExample(NamedTuple):
    """A text or a pair of texts, with a class's name or a number.

    group: examples that are scored together have one (a question's answers in MultiRC).
    """

    id: str
    text: str
    pair: str | None = None
    label: str | float | None = None
    group: str | None = None


class ChoiceExample(NamedTuple):
    """One text and several that may follow it; label: the right one's number."""

    id: str
    text: str
    options: tuple[str, ...]
    label: int | None = None


class TaggedExample(NamedTuple):
    """A sentence's words, and each word's tag."""

    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...] | None = None


class Answer(NamedTuple):
    """A piece of a text: text[start : start + len(text)], in characters."""

    text: str
    start: int


class SpanExample(NamedTuple):
    """A question to a text. answers: None: unknown; (): the text does not hold the answer."""

    id: str
    question: str
    text: str
    answers: tuple[Answer, ...] | None = None


class EntityExample(NamedTuple):
    """A text with entities, and a query in which one of them is missing.

    entities: spans of characters in the text, (start, end). answers: the right ones' texts.
    """

    id: str
    text: str
    query: str
    entities: tuple[tuple[int, int], ...]
    answers: tuple[str, ...] | None = None


Example = TextExample | ChoiceExample | TaggedExample | SpanExample | EntityExample
