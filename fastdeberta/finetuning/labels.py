"""Labels: the classes of a task, and examples with their numbers as features."""

from collections.abc import Sequence
from typing import Any

from . import features
from .examples import Example, TaggedExample, TextExample
from .features import Features
from .settings import FinetuneSettings
from .tasks import Task
from .windows import windows


def class_names(task: Task, train: Sequence[Example]) -> list[str]:
    """The classes in the order of their numbers: the task's, or those of the training data,
    sorted. None where a number or no class is predicted.

    Raises:
        ValueError: one class alone.
    """
    if task.labels is not None or task.head not in ("sequence", "token"):
        return list(task.labels or ())
    found: set[str] = set()
    for example in train:
        if isinstance(example, TaggedExample):
            found.update(example.tags or ())
        elif isinstance(example, TextExample) and example.label is not None:
            found.add(str(example.label))
    if len(found) < 2:
        has = f"one label, {found.pop()!r}" if found else "no label"
        raise ValueError(f"the training data of {task.name} have {has}: nothing to learn")
    return sorted(found)


def numbers(examples: Sequence[Example], names: Sequence[str], where: str) -> list[Any]:
    """Each example's label as a head is trained to give it: the number of a class (of a sentence, a
    list of them), of an option, or a float where there are no names.

    Args:
        where: what the examples are, for errors.

    Raises:
        ValueError: a missing label, or one that is not among `names` or not a number.
    """
    index = {name: i for i, name in enumerate(names)}

    def number(value: Any, place: int) -> Any:
        if value is None:
            raise ValueError(f"{where}, example {place}: no label")
        try:
            return index[str(value)] if names else float(value)
        except (KeyError, ValueError):
            known = ", ".join(names) if names else "the numbers"
            raise ValueError(
                f"{where}, example {place}: label {value!r} is not among {known}"
            ) from None

    found: list[Any] = []
    for place, example in enumerate(examples, 1):
        if isinstance(example, TaggedExample):
            tags = [None] * len(example.words) if example.tags is None else example.tags
            found.append([number(tag, place) for tag in tags])
        elif isinstance(example, TextExample):
            found.append(number(example.label, place))
        elif getattr(example, "label", getattr(example, "answers", None)) is None:
            raise ValueError(f"{where}, example {place}: no label")
        else:
            found.append(getattr(example, "label", None))
    return found


def encode(
    head: str,
    tokenizer: Any,
    examples: Sequence[Any],
    names: Sequence[str],
    settings: FinetuneSettings,
    training: bool,
    where: str,
) -> Features:
    """The examples as features for a head: with targets in training, without labels else.

    Raises:
        ValueError: no example, or labels that `numbers` refuses.
    """
    if not examples:
        raise ValueError(f"{where}: no example")
    found = numbers(examples, names, where) if training else None
    length = settings.max_length
    if head == "span":
        stride, query = settings.stride, settings.max_query_length
        return windows(tokenizer, examples, training, length, stride, query)
    if head == "entity":
        return features.entities(tokenizer, examples, training, length)
    if head == "choice":
        return features.choices(tokenizer, examples, found, length)
    if head == "token":
        return features.sentences(tokenizer, examples, found, length)
    return features.texts(tokenizer, examples, found, length)
