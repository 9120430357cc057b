"""Checkpoints on disk: asynchronous, atomic, checksummed. Orbax is used here and nowhere else.

WORKDIR/checkpoints/STEP/state/          what orbax writes
WORKDIR/checkpoints/STEP/checksums.json  written last: without it the checkpoint does not exist
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vit_jax.errors import UserError

logger = logging.getLogger(__name__)

_STATE, _CHECKSUMS = "state", "checksums.json"


class Store:
    """The checkpoints of one run folder.

    Saves run in the background, one at a time; an error of one is raised by the next call.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 2):
        self.directory = epath.Path(os.path.abspath(workdir)) / "checkpoints"
        self.keep = keep
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def save(self, step: int, tree: Any) -> None:
        """Starts saving a nested dict of arrays; returns once it may be overwritten.

        Raises:
          UserError: this or the previous save cannot be written. What was saved before is intact.
        """
        self.wait()
        path = self.directory / str(step)
        with _writing(path):
            if path.exists():  # half-written or damaged, or it would not be saved again
                path.rmtree()
            path.mkdir(parents=True)
            if self._orbax is None:
                self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
            self._orbax.save(path / _STATE, args=ocp.args.PyTreeSave(tree))
        self._pending = self._thread.submit(self._commit, path)

    def _commit(self, path: epath.Path) -> None:
        with _writing(path):
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                sums = {name: _digest(path / name) for name in _files(path)}
                write_atomically(path / _CHECKSUMS, json.dumps(sums, indent=1))
                # Later ones can only be damaged: this run has come from before them.
                kept = [step for step in self.steps() if step <= int(path.name)][-self.keep :]
                for step, committed in self._found():
                    if step < kept[0]:
                        # The commit mark goes first, so that a kill leaves no half of a
                        # checkpoint that claims to be whole.
                        if committed:
                            (self.directory / str(step) / _CHECKSUMS).unlink()
                        (self.directory / str(step)).rmtree()

    def wait(self) -> None:
        """Waits for the save under way, and raises its error if it had one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the save under way and frees the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return [step for step, committed in self._found() if committed]

    def _found(self) -> list[tuple[int, bool]]:
        if not self.directory.exists():
            return []
        paths = [path for path in self.directory.iterdir() if path.name.isdigit()]
        return sorted((int(path.name), (path / _CHECKSUMS).exists()) for path in paths)

    def newest(self) -> int | None:
        """Returns the newest step whose files all match their checksums, None if none was saved.

        Warns of every newer one that is damaged or half-written, by name.

        Raises:
          UserError: there are checkpoints, and every one of them is damaged.
        """
        damaged = []
        for step, committed in reversed(self._found()):
            path = self.directory / str(step)
            if not committed:
                logger.warning("ignoring %s: it was not completely written", path)
                continue
            problem = verify(path)
            if problem is None:
                return step
            damaged.append(problem)
            logger.warning("ignoring a damaged checkpoint: %s", problem)
        if damaged:
            raise UserError(
                f"every checkpoint in {self.directory} is damaged: {'; '.join(damaged)}; move the "
                "folder away to start from scratch"
            )
        return None

    def restore(self, step: int, target: Any) -> Any:
        """Reads the part of a checkpoint that `target` names, in its shapes, types and places.

        Args:
          target: nested dict of jax.ShapeDtypeStruct with a sharding, or of NumPy arrays or
            ShapeDtypeStructs without one, which are read into NumPy arrays.
        """

        def arguments(leaf):
            if getattr(leaf, "sharding", None) is None:
                return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=True
            )

        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            return orbax.restore(
                self.directory / str(step) / _STATE,
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=jax.tree.map(arguments, target),
                    partial_restore=True,
                ),
            )

    def names(self, step: int) -> set[str]:
        """The top-level names of a checkpoint: step, params, opt_state and, where on, ema."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            return set(orbax.metadata(self.directory / str(step) / _STATE).item_metadata.tree)


def verify(path: epath.Path) -> str | None:
    """Returns what is wrong with a committed checkpoint, None if every file is as it was written.

    Orbax alone restores most single flipped bits silently as other values.
    """
    try:
        expected = json.loads((path / _CHECKSUMS).read_text())
        for name, digest in expected.items():
            if not (path / name).exists():
                return f"{path / name} is missing"
            if _digest(path / name) != digest:
                return f"{path / name} does not match its checksum"
    except (OSError, ValueError, AttributeError) as error:
        return f"{path} is unreadable ({error})"
    return None


def _files(path: epath.Path, prefix: str = "") -> Iterator[str]:
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
    """Turns whatever orbax and tensorstore raise when a disk refuses into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = ("No space left", "File too large", "Disk quota", "Permission denied", "Read-only")
        reason = next((text for text in known if text in str(error)), None)
        if reason is None and not isinstance(error, OSError):
            raise
        raise UserError(
            f"the checkpoint {path} could not be written ({reason or error}): make room and start "
            "the same command again; it goes on from the checkpoint before this one"
        ) from error


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """Holds a run folder for this process; the operating system lets go of it when we are killed.

    Raises:
      UserError: another process holds it.
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
