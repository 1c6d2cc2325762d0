"""Work in background threads beside a detector, and the speed of a run."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WARM_UP = 2  # batches that are not timed
LEAST_TIMED = 3  # batches


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], pool: Executor, ahead: int
) -> Generator[Result, None, None]:
    """The function of each item, in order; up to `ahead` of them are computed in the pool before they are asked for.

    The items themselves are taken in the caller's thread. An error of the function is raised in its item's place, and
    what has not begun by then never does.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def next_chunks(items: Iterable[Item], size: int, pool: Executor, ahead: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter; the items themselves are made in the pool's only thread."""
    source = iter(items)
    chunks = run_ahead(lambda _: list(itertools.islice(source, size)), itertools.repeat(None), pool, ahead)
    for chunk in chunks:
        if not chunk:
            chunks.close()
            return
        yield chunk


@dataclass
class Speed:
    """What took how long. Decoding and drawing may be timed in several threads.

    Attributes:
        thing: what is counted, in the plural.
        decoding, drawing: seconds of each.
        batches: images and seconds of each.
    """

    thing: str
    decoding: list[float] = field(default_factory=list)
    drawing: list[float] = field(default_factory=list)
    batches: list[tuple[int, float]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def time(self, seconds: list[float]) -> Iterator[None]:
        """Add the block's seconds to one of this object's lists."""
        begin = time.perf_counter()
        yield
        with self._lock:
            seconds.append(time.perf_counter() - begin)

    @contextmanager
    def time_batch(self, images: int) -> Iterator[None]:
        """Time the detector on one batch."""
        begin = time.perf_counter()
        yield
        self.batches.append((images, time.perf_counter() - begin))

    def line(self, setting: str) -> str:
        """One line of text.

        Args:
            setting: what the speed depends on, such as "batch 1, bf16, cpu".
        """
        each = [
            f"{name} {_mean(times)}" for name, times in (("decode", self.decoding), ("draw", self.drawing)) if times
        ]
        apart = f"; apart from it, each: {', '.join(each)}" if each else ""
        return f"{sum(images for images, _ in self.batches)} {self.thing}, {self._rate(setting)}{apart}"

    def _rate(self, setting: str) -> str:
        timed = self.batches[WARM_UP:]
        if len(timed) < LEAST_TIMED:
            return f"too few to tell a speed: it takes {WARM_UP + LEAST_TIMED} batches ({setting})"
        images, seconds = (sum(column) for column in zip(*timed, strict=True))
        return f"{images / seconds:.1f} {self.thing} per second (warm, {images} timed, {setting})"


def _mean(seconds: list[float]) -> str:
    milliseconds = 1000 * sum(seconds) / len(seconds)
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
