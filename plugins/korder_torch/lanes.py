"""Blocks of the polynomial method side by side, a thread each: most of what a block does is too small for several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


class Lanes:
    """Threads that work on CPU tensors without autograd, each of them alone; the caller's settings stay as they are."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="korder")
        ready = Barrier(count)
        threads = torch.get_num_threads()
        for future in [self._pool.submit(_alone, ready) for _ in range(count)]:
            future.result()
        # the number is a thread's own, but the last one set is what threads to come begin with
        torch.set_num_threads(threads)

    def each(self, works: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Yield what every piece of work returns, in their order; no more are begun than there are lanes."""
        pending: deque[Future[T]] = deque()
        try:
            for work in works:
                if len(pending) == self.count:
                    yield pending.popleft().result()
                pending.append(self._pool.submit(work))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


def _alone(ready: Barrier) -> None:
    ready.wait()  # so that every thread of the pool comes by here
    torch.get_num_threads()  # what is set before a thread has once looked is forgotten
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
