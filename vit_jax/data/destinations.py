"""Where `prepare` writes: a folder on a disk, or one in a bucket that several processes fill.

In a bucket, a shard is made by who has the lease `.unfinished_SPLIT/FILE.lease`. It is written to a
temporary folder, sent as one object, and then its metadata: a shard is finished when both are
there. Who holds `.lease` writes the metadata of the split, once, the file INFO last.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vit_jax.data import shards
from vit_jax.data.forms.records import CONTENT, INFO
from vit_jax.errors import UserError
from vit_jax.lease import STALE, Lease, Taken
from vit_jax.objects import Entry, Objects, is_bucket
from vit_jax.writing import check_names, check_own, check_text, make_folder, write_atomically

logger = logging.getLogger(__name__)

_LARGEST = 5 * 2**30  # bytes that S3 takes at once


def _digest(plan: dict[str, Any]) -> str:
    """A digest of all of a plan but where the source is, which differs between machines."""
    same = {key: plan[key] for key in sorted(plan) if key != "source"}
    return hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]


@contextlib.contextmanager
def opened(dst: str, split: str) -> Iterator["Disk | Bucket"]:
    """Context of a destination to which this process may write.

    Raises:
      UserError: it holds something else, another process has it, or there is no permission.
      Unreachable: the store does not answer.
    """
    if is_bucket(dst):
        with tempfile.TemporaryDirectory(prefix="vit_jax-") as here:
            yield Bucket(dst, split, here)
        return
    check_text(dst)
    check_own(dst, shards.FILES, "prepared data")
    make_folder(dst)
    with _locked(dst):
        yield Disk(dst, split)


@contextlib.contextmanager
def _locked(dst: str) -> Iterator[None]:
    """Locks the folder against a second `prepare`; the lock ends with the process."""
    with open(os.path.join(dst, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is writing to {dst}") from None
        yield


class Disk:
    """A folder on a disk, which one process fills.

    Attributes:
      name: of the destination, as the user gave it.
      here: the local folder with the small files of all splits, to which new ones are written.
    """

    def __init__(self, dst: str, split: str):
        self.name = self.here = dst
        self._info = shards.info_path(dst, split)
        self._work = os.path.join(dst, shards.WORK.format(split=split))

    def info(self) -> dict[str, Any] | None:
        """What the file INFO says; None if the split is not finished."""
        return shards.read_json(self._info)

    def plan(self) -> dict[str, Any] | None:
        """The plan of the conversion that was begun; None if none was."""
        return shards.read_json(os.path.join(self._work, "plan.json"))

    def begin(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Records the plan; returns the one to follow."""
        os.makedirs(self._work, exist_ok=True)
        shards.write_json(os.path.join(self._work, "plan.json"), plan)
        return plan

    def next(
        self, files: Sequence[str], make: Callable[[str], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Makes one of the shards, unless it is there; returns the metadata of what is finished.

        Args:
          files: those that are not known to be finished.
          make: writes a shard to the folder `here`, and returns its metadata.
        """
        metadata = os.path.join(self._work, f"{files[0]}.json")
        shard = shards.read_json(metadata)
        if shard is None or shards.file_size(os.path.join(self.here, files[0])) != shard["bytes"]:
            shard = make(files[0])
            shards.write_json(metadata, shard)
        return {files[0]: shard}

    def progress(self) -> str:
        """What others do."""
        return ""

    def finish(self, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Writes the metadata of the split; returns what INFO says."""
        info = write()
        self.clean()
        return info

    def clean(self) -> None:
        """Deletes what only an unfinished split needs."""
        shutil.rmtree(self._work, ignore_errors=True)


class Bucket:
    """A folder in a bucket, filled by all processes that convert the same to it; as Disk.

    Raises:
      UserError: it holds something else, or there is no permission.
      Unreachable: the store does not answer.
    """

    def __init__(self, url: str, split: str, here: str):
        self.name, self.here = url, here
        self._split, self._work = split, shards.WORK.format(split=split)
        self._objects = Objects(url)
        self._leases: dict[str, Lease] = {}
        self._digest = ""
        self._found: dict[str, int] | None = None  # shards: there, made here, made by others
        self._waiting = ""
        self._fetch()

    def _fetch(self) -> None:
        """Copies the small files that say what is there to `here`."""
        names = self._objects.names()
        first = {name.partition("/")[0] for name in names}
        check_names(self.name, first, shards.FILES, "prepared data")
        for name in names:
            folder, _, file = name.rpartition("/")
            of_splits = not folder and file.startswith(("vit_jax_", "content_"))
            if of_splits or (folder.startswith(".unfinished_") and file == "plan.json"):
                content, _ = self._objects.read(name)
                if content is not None:
                    write_atomically(os.path.join(self.here, name), content)

    def info(self) -> dict[str, Any] | None:
        return self._json(INFO.format(split=self._split))

    def plan(self) -> dict[str, Any] | None:
        return self._json(f"{self._work}/plan.json")

    def _json(self, name: str) -> Any:
        content, _ = self._objects.read(name)
        return None if content is None else json.loads(content)

    def begin(self, plan: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(plan, indent=1).encode()
        if self._objects.write(f"{self._work}/plan.json", content, Objects.MISSING) is None:
            plan = self.plan() or plan  # another process was first
        self._digest = _digest(plan)
        return plan

    def _state(self) -> dict[str, Any] | None:
        """What INFO says; None while the split is unfinished.

        Raises:
          UserError: it is made with other settings by now, or was deleted.
        """
        for _ in range(2):  # the plan is deleted after INFO is written
            info = self.info()
            plan = info["plan"] if info else self.plan()
            if plan is not None:
                break
        if plan is None or _digest(plan) != self._digest:
            raise UserError(
                f"{self.name}: split {self._split!r} was deleted, or is made with other settings "
                "by now: see what is there, and start again"
            )
        return info

    def next(
        self, files: Sequence[str], make: Callable[[str], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        names = set(self._objects.names(self._work))
        damaged: set[str] = set()
        if info := self._state():  # after the listing, as what that lists is deleted after INFO
            found = {shard["file"]: shard for shard in info["shards"] if shard["file"] in files}
        else:
            known = [file for file in files if self._metadata(file) in names]
            found, damaged = self._finished(known)
        if self._found is None:
            self._found = {"there": len(found), "here": 0, "others": -len(found)}
        self._found["others"] += len(found)
        if found:
            return found
        # Shards that nobody has had come first, then those whose owners may be gone.
        for file in sorted(files, key=lambda file: self._lease(file) in names):
            with self._held(self._lease(file)) as lease:
                if lease is None:
                    continue
                content, generation = self._objects.read(self._metadata(file))
                if self._state() or (self._parsed(content) and file not in damaged):
                    return {}  # by now
                shard = self._make(file, lease, make, generation)
                self._found["here"] += 1
                return {file: shard}
        self._wait(files)
        return {}

    def _metadata(self, file: str) -> str:
        return f"{self._work}/{file}.json"

    def _lease(self, file: str) -> str:
        return f"{self._work}/{file}.lease"

    def _parsed(self, content: bytes | None) -> dict[str, Any] | None:
        """A shard's metadata, unless it is that of another plan."""
        found = json.loads(content or b"{}")
        return found if found.pop("plan", None) == self._digest else None

    def _finished(self, files: Sequence[str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Of shards that have metadata: those that are whole, and the names of the others."""
        if not files:
            return {}, set()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            contents = list(pool.map(lambda f: self._objects.read(self._metadata(f))[0], files))
        there, found = self._objects.folder(), {}
        for file, content in zip(files, contents, strict=True):
            shard = self._parsed(content)
            if shard and file in there and there[file].size == shard["bytes"]:
                found[file] = shard
        return found, set(files) - set(found)

    def _make(
        self,
        file: str,
        lease: Lease,
        make: Callable[[str], dict[str, Any]],
        generation: bytes,
    ) -> dict[str, Any]:
        """Makes a shard and sends it, then its metadata, if the lease is still our own."""
        path = os.path.join(self.here, file)
        before = self._version(file)
        try:
            shard = make(file)
            if self.name.startswith("s3://") and shard["bytes"] > _LARGEST:
                raise UserError(
                    f"{file} has {shard['bytes']:,} bytes, but S3 takes at most {_LARGEST:,} at "
                    "once: lower --shard-examples"
                )
            lease.confirm()
            with open(path, "rb") as whole:
                self._write(file, whole.read(), before)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{self.here}: {error.strerror}, where each shard is written before it is sent: "
                "make room, name a larger folder by TMPDIR, or lower --shard-examples"
            ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        lease.confirm()
        content = json.dumps({"plan": self._digest, **shard}).encode()
        if self._objects.write(self._metadata(file), content, generation) is None:
            raise UserError(f"{self.name}/{self._metadata(file)} was changed by somebody else")
        return shard

    def _version(self, name: str) -> bytes:
        """The generation of an object."""
        found = self._objects.folder().get(name)
        return Objects.MISSING if found is None else found.generation

    def _write(self, name: str, content: bytes, generation: bytes) -> None:
        """Writes an object if nobody has since its generation was looked at.

        Raises:
          Taken: somebody has, while this process slept.
        """
        if self._objects.write(name, content, generation) is None:
            raise Taken(f"{self.name}/{name} was written by another process meanwhile")

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[Lease | None]:
        """Takes a lease if it is free; one that is lost meanwhile ends the body, with a line."""
        lease = self._leases.setdefault(name, Lease(self.name, STALE, name))
        try:
            with lease.if_free() as mine:
                if mine:
                    del self._leases[name]
                yield lease if mine else None
        except Taken as error:
            lost = f"{self.name}/{name} was taken over by {lease.owner}"
            logger.warning("%s", lost if lease.owner else error)

    def _wait(self, files: Sequence[str]) -> None:
        leases = [self._leases.get(self._lease(file)) for file in files]
        owners = sorted({lease.owner for lease in leases if lease and lease.owner})
        waiting = f"waiting for the last shards, {len(files)}, made by {', '.join(owners)}"
        if owners and self._waiting != waiting:
            self._waiting = waiting
            logger.info("%s", waiting)
        time.sleep(STALE / 30)

    def progress(self) -> str:
        return f"shards by others: {self._found['others']}" if self._found else ""

    def finish(self, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Has one process write the metadata of the split; returns what INFO says."""
        while (info := self._state()) is None:
            with self._held(".lease") as lease:
                if lease is None:
                    time.sleep(STALE / 30)
                elif self._state() is None:
                    there = self._objects.folder()
                    self._fetch()
                    self._send(write(), lease, there)
        if self._found:
            logger.info(
                "%s: of %d shards, %d were made here, %d by others meanwhile, %d were there",
                f"split {self._split!r} of {self.name}",
                *(len(info["shards"]), self._found["here"]),
                *(self._found["others"], self._found["there"]),
            )
        self._fetch()  # what another process has written
        self.clean()
        return info

    def _send(self, info: dict[str, Any], lease: Lease, there: dict[str, Entry]) -> None:
        """Sends what was written to `here`, INFO last, unless there is one."""
        for name, other in shards.finished_splits(self.here, but=self._split).items():
            if other["plan"]["label_names"] != info["label_names"]:
                raise UserError(
                    f"{self.name} got split {name!r} meanwhile, which has other classes: name both "
                    "the same --classes"
                )
        last = INFO.format(split=self._split)
        new = (f"bad_images_{self._split}.jsonl", f"passed_over_{self._split}.jsonl")
        new += (CONTENT.format(split=self._split), "features.json", "label.labels.txt")
        for name in (*new, "dataset_info.json", last):
            path = os.path.join(self.here, name)
            if not os.path.exists(path):
                continue
            with open(path, "rb") as file:
                content = file.read()
            lease.confirm()
            self._write(name, content, there[name].generation if name in there else Objects.MISSING)

    def clean(self) -> None:
        self._objects.delete(f"{self._work}/")
