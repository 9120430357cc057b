"""Run folders in buckets, gs://BUCKET/... and s3://BUCKET/...: a local copy, and one writer.

The small files of a run folder are worked on in a local copy, and every change is sent as a whole
object; checkpoints go straight to the bucket (see checkpoints/store.py). A lease, the object
`.lease`, has one owner: it is taken and renewed by conditional writes, as is every small file, so
that a process which slept and lost it cannot write any more.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from vit_jax import distributed
from vit_jax.errors import UserError
from vit_jax.lease import Lease, held
from vit_jax.objects import Objects, cache, check, is_bucket
from vit_jax.writing import replacing

# What no copy has: checkpoints, hidden and temporary files, and what Weights & Biases sends itself.
_SKIPPED = re.compile(r"(^|/)(checkpoints/|wandb/|\.)|/$|\.tmp$")
_ATTACHED: dict[str, "Copy"] = {}  # local folder -> the copy in it


def attached(folder: str | os.PathLike) -> "Copy | None":
    """The copy that a local folder is, or is part of; None if it is not."""
    whole = Path(os.path.abspath(folder))
    for root in (whole, *whole.parents):
        if (copy := _ATTACHED.get(str(root))) is not None:
            inside = whole.relative_to(root).as_posix()
            return copy if root == whole else Copy(f"{copy.url}/{inside}", str(whole))
    return None


def shown(folder: str | os.PathLike) -> str:
    """The name of a folder as the user gave it: of a copy, its URL."""
    copy = attached(folder)
    return os.fspath(folder) if copy is None else copy.url


@contextlib.contextmanager
def working(workdir: str | os.PathLike) -> Iterator[str]:
    """Yields a local folder to run in; of a bucket, a copy of which process 0 sends every change.

    All processes of a run call this.

    Raises:
      UserError: another run has this folder, there is no permission, or a package is missing.
      Unreachable: the store does not answer.
    """
    if not is_bucket(workdir):
        yield os.fspath(workdir)
        return
    url = check(workdir)
    with contextlib.ExitStack() as stack:
        lease = Lease(url)

        def take() -> str:
            stack.enter_context(lease)
            return lease.id

        token = distributed.first("lease", take)
        # A temporary folder, as another process may look at the same run from here.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vit_jax-"))
        copy = Copy(url, os.path.join(folder, url.rpartition("/")[2]), token)
        os.mkdir(copy.folder)
        distributed.each("pull", copy.pull)
        _ATTACHED[copy.folder] = copy
        stack.callback(_ATTACHED.pop, copy.folder)
        if distributed.is_lead():
            copy.lease, lease.at_each_beat = lease, copy.push
            copy.renew()
        try:
            yield copy.folder
        except BaseException:
            with contextlib.suppress(UserError):
                copy.push()
            raise
        copy.push()


def local(path: str | os.PathLike) -> str:
    """The local path of a run folder, of a checkpoint in it, or of a sweep; disks' as they are.

    Of a bucket, the small files are copied to the cache ($VIT_JAX_CACHE, or ~/.cache/vit_jax).

    Raises:
      UserError: nothing is there, there is no permission, or a package is missing.
      Unreachable: the store does not answer.
    """
    if not is_bucket(path):
        return os.fspath(path)
    url = check(path)
    found = re.fullmatch(r"(.+)(/checkpoints/(?:best|\d+))", url)
    url, step = found.groups() if found else (url, "")
    copy = Copy(url, os.path.join(os.path.abspath(cache()), "runs", url.replace("://", "/")))
    if not copy.pull():
        raise UserError(f"there is nothing at {url}")
    _ATTACHED[copy.folder] = copy
    return copy.folder + step


@dataclasses.dataclass
class Copy:
    """A local copy of the small files of a folder in a bucket: all but its checkpoints.

    Attributes:
      url: of the folder.
      folder: the local folder.
      token: names what this run writes, apart from what another one wrote; "" of a copy to read.
      lease: what allows to write; None in the processes that do not.
    """

    url: str
    folder: str
    token: str = ""
    lease: Lease | None = None

    def __post_init__(self):
        self._objects = Objects(self.url)
        self._lock = threading.Lock()
        self._sent: dict[str, tuple[bytes, bytes]] = {}  # name: content's digest, generation
        self._tried: dict[str, set[bytes]] = {}  # name: digests of what may have got there

    def pull(self, inside: str = "") -> int:
        """Brings the copy to what is in the bucket; returns how many objects there are.

        Args:
          inside: a folder in it, which alone is looked at.
        """
        start = f"{inside}/" if inside else ""
        there = self._objects.names(after=start, before=f"{inside}0" if inside else "")
        names = [name for name in there if not _SKIPPED.search(name)]
        for name in names:
            path = self._path(name)
            content, generation = self._objects.read(name)
            if content is None:
                continue
            if not path.is_file() or path.read_bytes() != content:
                with replacing(path, f"{path}.{os.getpid()}.tmp") as temporary:
                    Path(temporary).write_bytes(content)
            self._sent[name] = (_digest(content), generation)
        for name in self._files():
            if name.startswith(start) and name not in names:
                self._path(name).unlink(missing_ok=True)
        return len(there)

    def push(self) -> None:
        """Sends what changed, each file as one object, unless another process wrote there.

        Of a .jsonl, that is its whole lines. Without a lease nothing is sent.

        Raises:
          UserError: the lease is another's now.
          Unreachable: the store does not answer.
        """
        if self.lease is None:
            return
        with self._lock:
            for name in self._files():
                try:
                    content = self._path(name).read_bytes()
                except FileNotFoundError:  # a temporary
                    continue
                if name.endswith(".jsonl"):
                    content = content[: content.rfind(b"\n") + 1]
                digest, generation = self._sent.get(name, (b"", Objects.MISSING))
                if digest == (now := _digest(content)):
                    continue
                self.lease.confirm()
                tried = self._tried.setdefault(name, set())
                tried.add(now)
                made = self._objects.write(name, content, generation)
                if made is None:  # or a write that seemed to fail did not
                    there, generation = self._objects.read(name)
                    if there is not None and _digest(there) in tried:
                        made = self._objects.write(name, content, generation)
                if made is None:
                    self.lease.confirm()  # says who has the lease, if that is why
                    raise UserError(f"{self.url}/{name} was changed by somebody else meanwhile")
                self._sent[name], self._tried[name] = (now, made), set()

    def renew(self) -> None:
        """Writes each file again as it is: one who slept knows another generation of it.

        On S3, which numbers by content, this holds from the first change on.
        """
        for name, (digest, generation) in self._sent.items():
            content = self._path(name).read_bytes()
            made = self._objects.write(name, content, generation)
            self._sent[name] = (digest, made or generation)

    def send(self, inside: str) -> None:
        """Sends the files of a folder in it, which no run writes, over what is there."""
        for name in self._files():
            if name.startswith(f"{inside}/"):
                content = self._path(name).read_bytes()
                while self._objects.write(name, content, self._objects.read(name)[1]) is None:
                    pass

    def confirm(self) -> None:
        """Renews the lease, if this process has it.

        Raises:
          UserError: it is another's now.
        """
        if self.lease is not None:
            self.lease.confirm()

    def held(self) -> bool:
        """Whether somebody writes there, by the time of the last heartbeat."""
        return held(self.url)

    def _files(self) -> list[str]:
        found = []
        for folder, _, files in os.walk(self.folder):
            inside = os.path.relpath(folder, self.folder)
            found += [os.path.normpath(os.path.join(inside, name)) for name in files]
        return sorted(name for name in found if not _SKIPPED.search(name))

    def _path(self, name: str) -> Path:
        path = Path(self.folder, name)
        if not re.fullmatch(r"[^\0]+", name) or ".." in name.split("/") or name[0] == "/":
            raise UserError(f"{self.url} has an object {name!r}, which is no name of a file")
        return path


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
