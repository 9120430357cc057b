"""Checkpoints on disk: asynchronous, atomic and checksummed. The only module that uses Orbax.

WORKDIR/checkpoints/STEP/state/          Orbax's files
WORKDIR/checkpoints/STEP/checksums.json  written last: a checkpoint without it is incomplete
WORKDIR/checkpoints/best.json            which one is the best, if the run keeps it

In a bucket, Orbax's files are in STEP/state-ID, apart from those that another run, which slept and
lost the folder, may still write (see buckets.py).
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from vit_jax import buckets, distributed, objects
from vit_jax.checkpoints import orbax_s3
from vit_jax.errors import Unreachable, UserError, check_refused, why
from vit_jax.writing import check_own, check_text, make_folder, write_atomically

logger = logging.getLogger(__name__)

_STATE, _CHECKSUMS, _BEST = "state", "checksums.json", "best.json"
_AWAY = "away: "  # begins what one process tells the others of a bucket that does not answer
# What may be in the folder of a run that begins: what an earlier start left, and logs.
RUN_FILES = (
    *("checkpoints", "model", "config.json", "data.json", "teacher.json", "metrics.jsonl"),
    *("starts.jsonl", "corrupt.jsonl", "curves.png", "tensorboard", "wandb", "wandb_id"),
    *("evaluation", "report.html", "report.md", "*.log", "*.out", "*.err", "lost+found"),
    "pictures.png",
)
# Errors that tensorstore reports as text.
_REFUSALS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE)


class Store:
    """The checkpoints of one run folder.

    Saves run in the background, one at a time; the next call raises the error of a failed one.

    With several processes, each writes its own parts of a checkpoint: `save`, `wait` and `close`
    are collective (see distributed.py). Reading is not: a process restores what its devices need.
    `newest` is collective, with the same result for all, only with `together`.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2, together: bool = False):
        self._bucket = buckets.attached(workdir)
        root = self._bucket.url if self._bucket else os.path.abspath(workdir)
        self.directory = epath.Path(root) / "checkpoints"
        token = self._bucket.token if self._bucket else ""
        self._name = f"{_STATE}-{token}" if token else _STATE
        self.keep = keep
        self._together = together and distributed.count() > 1
        self._orbax: Any = None  # an AsyncCheckpointer; to import Orbax takes a second
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        # None: nobody said which, and best.json is left as it is.
        self._best: tuple[int | None, dict[str, float]] | None = None

    def save(self, step: int, tree: Any) -> None:
        """Starts saving a nested dict of arrays; once it returns, they may be overwritten.

        Raises:
          UserError: this or the previous save failed. Older checkpoints are intact.
        """
        self.wait()
        path = self.directory / str(step)
        distributed.first("make room", lambda: self._make_room(path))
        with _writing(path):
            import orbax.checkpoint as ocp

            if self._orbax is None:
                everyone = range(distributed.count())
                self._orbax = ocp.AsyncCheckpointer(
                    ocp.PyTreeCheckpointHandler(multiprocessing_options=_of(everyone)),
                    multiprocessing_options=_of(everyone),
                    **orbax_s3.options(self.directory),
                )
            self._orbax.save(path / self._name, args=ocp.args.PyTreeSave(tree))
        self._pending = self._thread.submit(self._commit, path)

    def _make_room(self, path: epath.Path) -> None:
        with _writing(path):
            if self._bucket is not None:  # what another one left there goes with old checkpoints
                self._bucket.confirm()
                path = path / self._name
            if path.exists():  # half-written or damaged, or it would not be saved again
                path.rmtree()
            if self._bucket is None:
                path.mkdir(parents=True)

    def _commit(self, path: epath.Path) -> None:
        with _writing(path):
            self._orbax.wait_until_finished()
            # Process 0 has waited until Orbax had written the parts of all processes.
            names = distributed.first(
                "written", lambda: list(_files(path / self._name, f"{self._name}/"))
            )
            sums = _shared("sums", names, lambda name: _digest(path / name))
            distributed.first("commit", lambda: self._mark(path, sums))

    def _mark(self, path: epath.Path, sums: dict[str, str]) -> None:
        with _writing(path):
            if self._bucket is not None:  # metrics.jsonl before the checkpoint, and the lease
                self._bucket.push()
                self._bucket.confirm()
            write_atomically(path / _CHECKSUMS, json.dumps(sums, indent=1))
            self._write_best()
            # Newer ones can only be damaged, as this run started from an older one.
            kept = [step for step in self.steps() if step <= int(path.name)][-self.keep :]
            if self._bucket is not None:
                self._bucket.confirm()
            for step, committed in self._found():
                if step < kept[0] and (self._best is None or step != self._best[0]):
                    # checksums.json goes first, so that a kill during the deletion leaves an
                    # incomplete checkpoint, not a damaged one.
                    with contextlib.suppress(FileNotFoundError):  # by a try without an answer
                        if committed:
                            (self.directory / str(step) / _CHECKSUMS).unlink(missing_ok=True)
                        (self.directory / str(step)).rmtree()

    def keep_best(self, step: int | None, values: dict[str, float]) -> None:
        """Keeps the checkpoint of a step beside the last ones, as the best one; None keeps none.

        best.json says so as soon as that checkpoint is complete. `values` are written with it.
        """
        if self._best != (step, values):
            self.wait()
            self._best = step, values
            if distributed.is_lead():
                self._write_best()

    def _write_best(self) -> None:
        if self._best is None:
            return
        step, values = self._best
        path = self.directory / _BEST
        if self._bucket is not None:
            self._bucket.confirm()
        if step is None:
            path.unlink(missing_ok=True)
        elif step in self.steps():
            write_atomically(path, json.dumps({"step": step, **values}))

    def best(self) -> int:
        """The step of the best checkpoint.

        Raises:
          UserError: the run keeps none, or has not saved it yet.
        """
        path = self.directory / _BEST
        try:
            with _talking(path):
                return int(json.loads(path.read_text())["step"])
        except FileNotFoundError:
            raise UserError(
                f"{self.directory.parent} has no best checkpoint: a run keeps one with "
                "--config.checkpoint.best=val/accuracy"
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: {error!r}") from None

    def whole(self, step: int) -> None:
        """Raises a UserError unless the checkpoint of this step is there and undamaged."""
        if step not in self.steps():
            kept = ", ".join(f"{each:,}" for each in self.steps()) or "none"
            raise UserError(f"{self.directory} has no checkpoint of step {step:,}; it has: {kept}")
        if problem := verify(self.directory / str(step)):
            raise UserError(f"the checkpoint of step {step:,} is damaged: {problem}")

    def wait(self) -> None:
        """Waits for the current save, and raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the current save and frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, oldest first."""
        return [step for step, committed in self._found() if committed]

    def _found(self) -> list[tuple[int, bool]]:
        with _talking(self.directory):
            if not self.directory.exists():
                return []
            paths = [path for path in self.directory.iterdir() if path.name.isdigit()]
            return sorted((int(path.name), (path / _CHECKSUMS).exists()) for path in paths)

    def newest(self) -> int | None:
        """Returns the newest step with matching checksums, None if nothing was saved.

        Logs a warning for each newer one that is damaged or incomplete. With `together`, the
        processes share the reading.

        Raises:
          UserError: there are checkpoints, and every one of them is damaged.
        """
        damaged, together = [], self._together
        warn = logger.warning if not together or distributed.is_lead() else logger.debug
        found = distributed.first("found", self._found) if together else self._found()
        for step, committed in reversed(found):
            path = self.directory / str(step)
            if not committed:
                warn("ignoring %s: it was not completely written", path)
                continue
            problem = verify(path, together=together)
            if problem is None:
                return step
            damaged.append(problem)
            warn("ignoring a damaged checkpoint: %s", problem)
        if damaged:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged: {'; '.join(damaged)}; move the "
                "folder away to start from scratch"
            )
        return None

    def restore(self, step: int, target: Any) -> Any:
        """Reads the part of a checkpoint in `target`, with its shapes, types and shardings.

        Args:
          target: nested dict of jax.ShapeDtypeStruct with a sharding, or of NumPy arrays or
            ShapeDtypeStructs without one, which are read into NumPy arrays.
        """
        import orbax.checkpoint as ocp

        def arguments(leaf):
            if getattr(leaf, "sharding", None) is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
            )

        with _talking(self.directory), self._reader() as orbax:
            return orbax.restore(
                self._state(step),
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=jax.tree.map(arguments, target),
                    partial_restore=True,
                ),
            )

    def names(self, step: int) -> set[str]:
        """The top-level names in a checkpoint: step, params, opt_state and, if enabled, ema."""
        with _talking(self.directory), self._reader() as orbax:
            return set(orbax.metadata(self._state(step)).item_metadata.tree)

    def _reader(self) -> Any:
        """An Orbax reader that does not wait for other processes."""
        import orbax.checkpoint as ocp

        alone = _of({distributed.index()})
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        options = orbax_s3.options(self.directory)
        return ocp.Checkpointer(handler, multiprocessing_options=alone, **options)

    def _state(self, step: int) -> epath.Path:
        """Orbax's folder of a complete checkpoint."""
        path = self.directory / str(step)
        return path / next(iter(json.loads((path / _CHECKSUMS).read_text()))).partition("/")[0]


def verify(path: epath.Path, *, together: bool = False) -> str | None:
    """Verifies a checkpoint's checksums; returns the first problem, or None.

    Orbax alone restores most flipped bits silently as other values. With `together`, the processes
    share the files, and all get the same answer (collective).
    """

    def check(name: str, digest: str) -> str:
        try:
            if not (path / name).exists():
                return f"{path / name} is missing"
            if _digest(path / name) != digest:
                return f"{path / name} does not match its checksum"
        except Exception as error:
            told = _told(path, error)
            if together and told is not None:  # the other processes would wait
                return f"{_AWAY}{told}"
            if told is not None:
                raise told from error
            if not isinstance(error, OSError):
                raise
            if not together:
                check_refused(error, path / name)
            return f"{path} is unreadable ({error})"
        return ""

    def read() -> list[Any]:
        try:
            with _talking(path):
                return [{**json.loads((path / _CHECKSUMS).read_text())}, None]
        except UserError:
            raise
        except (OSError, ValueError, TypeError) as error:
            check_refused(error, path / _CHECKSUMS)
            return [{}, f"{path} is unreadable ({error})"]

    expected, problem = distributed.first("checksums", read) if together else read()
    if problem is not None:
        return problem
    if not together:
        return next(filter(None, (check(*item) for item in expected.items())), None)
    found = _shared("verify", list(expected), lambda name: check(name, expected[name]))
    for each in found.values():
        if each.startswith(_AWAY):
            raise Unreachable(each.removeprefix(_AWAY))
    return next(filter(None, found.values()), None)


def _told(path: epath.Path, error: Exception) -> UserError | None:
    """What an error means of a file in a bucket; None on a disk, and where a file is missing."""
    if not buckets.is_bucket(path) or isinstance(error, (UserError, FileNotFoundError)):
        return None
    return objects.explained(os.fspath(path), error)


@contextlib.contextmanager
def _talking(path: epath.Path) -> Iterator[None]:
    """Context that says what an error of a bucket's client means."""
    try:
        yield
    except Exception as error:
        if (told := _told(path, error)) is not None:
            raise told from error
        raise


def _shared(name: str, files: list[str], work: Callable[[str], str]) -> dict[str, str]:
    """Distributes `work` on files over the processes; all get every result (collective)."""
    mine = {file: work(file) for file in files[distributed.index() :: distributed.count()]}
    merged: dict[str, str] = {}
    for part in distributed.gather(name, json.dumps(mine)):
        merged |= json.loads(part)
    return {file: merged[file] for file in files}


def _of(processes: Iterable[int]) -> Any:
    """Orbax's option for who takes part; with it, Orbax does not synchronise through devices."""
    import orbax.checkpoint as ocp

    processes = set(processes)
    return ocp.options.MultiprocessingOptions(
        primary_host=min(processes), active_processes=processes
    )


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
    if buckets.is_bucket(path):  # whose folders are names alone, and some have an object, too
        names = objects.Objects(os.fspath(path)).names()
        yield from (prefix + name for name in names if not name.endswith("/"))
        return
    for child in sorted(path.iterdir(), key=lambda child: child.name):
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        elif prefix + child.name != _CHECKSUMS:
            yield prefix + child.name


def _digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(path: epath.Path) -> Iterator[None]:
    """Context that turns disk errors of Orbax and tensorstore into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if buckets.is_bucket(path) and (told := objects.explained(str(path), error)):
            raise told from error
        number = next((n for n in _REFUSALS if os.strerror(n) in str(error)), None)
        if number is None and not isinstance(error, OSError):
            raise
        reason = error if number is None else OSError(number, os.strerror(number))
        raise UserError(
            f"the checkpoint {path} could not be written: {why(reason)}, and start the same "
            "command again; it goes on from the checkpoint before this one"
        ) from error


def claim(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    """Creates the run folder and locks it, for all processes."""
    token = epath.Path(workdir / f".seen_by_{os.getpid()}_{time.time_ns()}")

    def make() -> str:
        check_text(workdir)
        if not (workdir / "config.json").exists():  # of a run that was begun
            check_own(workdir, RUN_FILES, "a run")
        make_folder(workdir, "--workdir")
        stack.enter_context(lock(workdir))
        if distributed.count() > 1 and not buckets.attached(workdir):
            token.touch()
        return token.name

    name = distributed.first("claim", make)

    def see() -> None:
        apart = distributed.count() > 1 and not buckets.attached(workdir)
        if apart and not (workdir / name).exists():
            raise UserError(
                f"{workdir} is not the folder that process 0 sees under this name: --workdir must "
                "be on a disk that all hosts share"
            )

    try:
        distributed.each("see", see)
    finally:
        token.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Locks a run folder for this process; the operating system releases it if we are killed.

    Raises:
      UserError: another process holds the lock.
    """
    with open(os.path.join(workdir, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{workdir} is in use by {owner}: wait for it to end, or name another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename} since {time.ctime()}")
        file.flush()
        yield
