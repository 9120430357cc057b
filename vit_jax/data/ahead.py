"""Reads batches ahead of the training, on threads or in worker processes."""

import concurrent.futures
import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags


def threads_of(workers: int, threads: int | None) -> int:
    """Threads that read rows of a batch: `threads`, or one for each core; one in a worker."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count() or 1
    return 1 if workers else threads or cores


class Fetched:
    """Reads the examples of coming batches on many threads, as a bucket answers late.

    Args:
      source: anything with `source[index]`.
      threads: at once; each waits for one answer.
    """

    def __init__(self, source: Any, threads: int):
        self._source, self._threads = source, threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "fetch")
        self._lock = threading.Lock()
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
            begun = sum(map(len, self._begun.values()))
            for each in range(step, stop, stride):
                if each not in self._begun:
                    if each > step and begun > 2 * self._threads:
                        break
                    examples = indices(each)
                    begun += len(examples)
                    self._begun[each] = [
                        None if i < 0 else self._pool.submit(self._source.__getitem__, int(i))
                        for i in examples
                    ]
            futures = self._begun.pop(step)
        return lambda row: futures[row].result()


def read_ahead(
    read: Callable[[int], Any], steps: range, workers: int
) -> contextlib.closing[Iterator[Any]]:
    """Returns `read(step)` of each of the steps, in order, to be used in a `with`.

    Args:
      read: pickled for worker processes.
      workers: processes that read; 0 is two threads of this one.
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
    return contextlib.closing(iter(dataset))


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
