"""What the next steps need, made by threads while a step computes."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(
    make: Callable[[int], T], steps: range, workers: int, start: Callable[[], None] | None = None
) -> Iterator[Iterator[T]]:
    """make(step) for every step, in order; up to 2 * workers of them are made ahead.

    Which thread makes what does not show: an exception is raised where its step is taken, and no
    thread is left when the block ends.

    Args:
        workers: threads; 0: each is made where it is taken. start: each thread calls it first.
    """
    if not workers:
        yield map(make, steps)
        return
    pool = ThreadPoolExecutor(workers, "prefetch", start or (lambda: None))
    try:
        yield _in_order(pool, make, iter(steps), 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, make: Callable[[int], T], steps: Iterator[int], ahead: int
) -> Iterator[T]:
    pending = deque(pool.submit(make, step) for step in islice(steps, ahead))
    while pending:
        made = pending.popleft().result()
        pending.extend(pool.submit(make, step) for step in islice(steps, 1))
        yield made
