"""Acceptability judgements made from a text: its own sentences, and the same ones corrupted."""

import random
import re
from collections.abc import Callable, Iterator, Sequence

from ..finetuning.examples import TextExample

ACCEPTABLE, UNACCEPTABLE = "acceptable", "unacceptable"
LABELS = (ACCEPTABLE, UNACCEPTABLE)

# Words of a sentence: with fewer there is little to corrupt, and more are cut by short models.
_LEAST, _MOST = 6, 30
# A sentence ends behind a word: three small letters or digits before the mark leave out most
# abbreviations ("St. Louis", "U.S. Army").
_END = re.compile(r"(?<=[a-z0-9]{3}[.!?])\s+(?=[A-Z\"])")
# Words that cannot well be left out, and words in the place of which another cannot well stand.
_NEEDED = frozenset(
    ("a", "an", "the", "of", "in", "to", "is", "was", "are", "were", "and", "by", "for", "with")
    + ("from", "as", "at", "on", "has")
)
_EXCHANGE = {
    "is": "are",
    "was": "were",
    "has": "have",
    "a": "an",
    "this": "these",
    "that": "those",
    "its": "their",
    "he": "him",
    "they": "them",
}
_EXCHANGE |= {other: word for word, other in _EXCHANGE.items()}


def sentences(document: str) -> list[str]:
    """The sentences of 6 to 30 words that end with a full stop."""
    found = (sentence.strip() for sentence in _END.split(document))
    return [s for s in found if s.endswith(".") and _LEAST <= len(s.split()) <= _MOST]


def corrupt(sentence: str, choice: random.Random) -> str | None:
    """The sentence with one error of a kind drawn at random among those that fit it.

    The kinds: two neighbouring words swapped, a function word left out, a word twice, a form that
    does not agree (is for are, a for an). Case and full stop stay in their places, so that they
    give nothing away. None: no error fits.
    """
    words = sentence.removesuffix(".").split()
    for kind in choice.sample(KINDS, len(KINDS)):
        changed = list(kind(words, choice))
        # Of capitals the models may see nothing: what differs in them alone is no error.
        if changed and [w.lower() for w in changed] != [w.lower() for w in words]:
            return " ".join(changed) + "."
    return None


def _swap(words: Sequence[str], choice: random.Random) -> Iterator[str]:
    # The first word, with its capital, stays.
    i = choice.randrange(1, len(words) - 1)
    yield from (*words[:i], words[i + 1], words[i], *words[i + 2 :])


def _leave_out(words: Sequence[str], choice: random.Random) -> Iterator[str]:
    places = [i for i, word in enumerate(words) if word in _NEEDED]
    if places:
        i = choice.choice(places)
        yield from (*words[:i], *words[i + 1 :])


def _double(words: Sequence[str], choice: random.Random) -> Iterator[str]:
    i = choice.randrange(1, len(words))
    yield from (*words[: i + 1], *words[i:])


def _exchange(words: Sequence[str], choice: random.Random) -> Iterator[str]:
    places = [i for i, word in enumerate(words) if word in _EXCHANGE]
    if places:
        i = choice.choice(places)
        yield from (*words[:i], _EXCHANGE[words[i]], *words[i + 1 :])


KINDS: tuple[Callable[[Sequence[str], random.Random], Iterator[str]], ...]
KINDS = (_swap, _leave_out, _double, _exchange)


def examples(
    documents: Sequence[str], count: int | None = None, seed: int = 0
) -> list[TextExample]:
    """`count` examples (None: all), half of them corrupted; the same ones for the same seed.

    Every sentence comes once as it is and once corrupted, one after the other, so that no word
    alone tells the two apart.

    Raises:
        ValueError: the documents do not have so many.
    """
    choice = random.Random(seed)
    found = list(dict.fromkeys(s for document in documents for s in sentences(document)))
    choice.shuffle(found)
    seen, made = set(found), list[TextExample]()
    for sentence in found:
        if count is not None and len(made) >= count:
            break
        changed = corrupt(sentence, choice)
        if changed is not None and changed not in seen:
            made.append(TextExample("", sentence, label=ACCEPTABLE))
            made.append(TextExample("", changed, label=UNACCEPTABLE))
    if count is not None and len(made) < count:
        raise ValueError(f"acceptability: {count} examples asked for, the text has {len(made)}")
    return made
