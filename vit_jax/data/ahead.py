"""Reads batches ahead of the training, on threads or in worker processes."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from vit_jax.data import storage


def threads_of(workers: int, threads: int | None) -> int:
    """Threads that read rows of a batch: `threads`, or one for each core; one in a worker."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count() or 1
    return 1 if workers else threads or cores


class Fetched:
    """Reads the examples of coming batches on many threads, as a bucket answers late.

    Pickled for worker processes, with what was listed, so that all read the same versions.

    Args:
      source: anything with `source[index]`.
      threads: at once; each waits for one answer.
      cache: where what is read is kept (see `DataConfig`).
    """

    def __init__(self, source: Any, threads: int, cache: str | None):
        self.__setstate__((source, threads, cache, storage.listings()))

    def __getstate__(self) -> tuple[Any, ...]:
        return self._source, self._threads, self._cache, storage.listings()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._source, self._threads, self._cache, listings = state
        storage.know(listings)
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._begun: dict[int, list[concurrent.futures.Future | None]] = {}

    def rows(
        self, step: int, stride: int, stop: int, indices: Callable[[int], np.ndarray]
    ) -> Callable[[int], Any]:
        """Returns what reads a row of the batch of a step; those of the next steps are begun.

        Args:
          stride: from one step that this process reads to its next.
          indices: the examples of a step's batch; -1 is none.
        """
        with self._lock:
            if self._pool is None:
                storage.keep(self._cache)
                self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "fetch")
            begun = sum(map(len, self._begun.values()))
            for each in range(step, stop, stride):
                if each not in self._begun:
                    if each > step + stride and begun > 2 * self._threads:
                        break
                    self._begun[each] = self._begin(indices(each))
                    begun += len(self._begun[each])
            futures = self._begun.pop(step)
        return lambda row: futures[row].result()

    def _begin(self, examples: np.ndarray) -> list[concurrent.futures.Future | None]:
        read, begun = self._source.__getitem__, {-1: None}
        for index in map(int, examples):  # with repeats, one is there several times
            if index not in begun:
                begun[index] = self._pool.submit(read, index)
        return [begun[int(index)] for index in examples]

    def close(self) -> None:
        """Leaves what nobody waits for unread, so that the process can end."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Closing:
    """An iterator with more to close than itself."""

    iterator: Iterator[Any]
    more: Callable[[], None]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.iterator)

    def close(self) -> None:
        self.more()
        self.iterator.close()


def read_ahead(
    read: Callable[[int], Any], steps: range, workers: int, close: Callable[[], None] = bool
) -> contextlib.closing[Iterator[Any]]:
    """Returns `read(step)` of each of the steps, in order, to be used in a `with`.

    Args:
      read: pickled for worker processes.
      workers: processes that read; 0 is two threads of this one.
      close: called at the end, before the reading stops.
    """
    import grain  # late, as it takes a second

    batches = grain.MapDataset.range(steps.start, steps.stop).map(read)
    # Two batches at a time, so that no thread is idle while the last rows of one are read.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    dataset = batches.to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(
            options, worker_init_fn=functools.partial(end_with, os.getpid())
        )
    return contextlib.closing(_Closing(iter(dataset), close))


def end_with(parent: int, worker_index: int, worker_count: int) -> None:
    """Ends this worker process when its parent is gone, which a killed parent cannot do."""
    del worker_index, worker_count
    # On a signal to the process group, the parent saves before it ends the workers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
