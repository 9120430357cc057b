"""Objects in Google Cloud Storage and S3, read and written as wholes; what their errors mean."""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vit_jax.errors import Unreachable, UserError
from vit_jax.extras import install

_NEEDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: package for listing, extra
AT_ONCE = 512  # requests of a process
RETRIES = {"max_retries": 12, "initial_delay": "200ms", "max_delay": "16s"}  # 100 s in all
# tensorstore's codes, as texts of its errors.
_AGAIN = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "CURL")
_REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden")
# What fsspec's clients raise: errors of these packages, or of the system with these numbers.
_NETWORK = ("aiohttp", "botocore", "requests", "urllib3")
_BUSY = (errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.EREMOTEIO)
_LOGIN = {
    "gs": "`gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is a URL of an object store."""
    return "://" in os.fspath(path)


def cache() -> Path:
    """Where copies of what is elsewhere are kept: $VIT_JAX_CACHE, or ~/.cache/vit_jax."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VIT_JAX_CACHE") or f"{caches}/vit_jax").expanduser()


def check(url: str | os.PathLike, whole: bool = False) -> str:
    """Returns a URL of a folder in a bucket without a slash at its end.

    Args:
      whole: whether it may be a bucket itself.

    Raises:
      UserError: another scheme, no bucket, a part that a folder cannot be named, or the package
        for it is not installed.
    """
    url = os.fspath(url).rstrip("/")
    scheme, _, rest = url.partition("://")
    if scheme not in _NEEDS:
        raise UserError(f"{url}: expected gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a folder")
    parts = rest.split("/")
    if len(parts) < 2 - whole or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{url}: expected {scheme}://BUCKET/FOLDER")
    package, extra = _NEEDS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{url} needs {package}: {install(extra)}")
    _prepare_fsspec()
    return url


@functools.cache
def _prepare_fsspec() -> None:
    """Has fsspec ask the store at each listing: a run's folder changes under its feet."""
    from etils.epath import gpath
    from fsspec.config import conf

    # With TensorFlow installed, epath would use its file systems, which know neither.
    os.environ.setdefault("EPATH_USE_TF", "0")
    if hasattr(gpath._is_tf_installed, "cache_clear"):
        gpath._is_tf_installed.cache_clear()

    for scheme in _NEEDS:
        conf.setdefault(scheme, {})["use_listings_cache"] = False
    if "STORAGE_EMULATOR_HOST" in os.environ:  # at each call, gcsfs misses Google's credentials
        logging.getLogger("gcsfs").setLevel(logging.ERROR)


class Entry(NamedTuple):
    """What a folder has under a name.

    Attributes:
      size: in bytes; None is a folder.
      generation: the store's name of this version, as `Objects` has it.
    """

    size: int | None
    generation: bytes = b""


class Objects:
    """The objects below a URL, read and written as wholes through tensorstore.

    Its clients retry what a network does (429, 500, 503, resets), with back-off, for a minute or
    two. `generation` is the store's name of a version; MISSING is that of no object.
    """

    MISSING = b"\x02"

    def __init__(self, url: str):
        self.url = url

    @functools.cached_property
    def _store(self) -> Any:
        import tensorstore

        with _explained(self.url):
            stores, limit = ("gcs", "s3"), {"limit": AT_ONCE}
            retries = {f"{store}_request_retries": RETRIES for store in stores}
            concurrency = {f"{store}_request_concurrency": limit for store in stores}
            context = tensorstore.Context({**retries, **concurrency})
            return tensorstore.KvStore.open(driver(self.url), context=context).result()

    def names(self, before: str = "", after: str = "") -> list[str]:
        """Names of all objects, relative to the URL, sorted; of those from `after` to `before`."""
        import tensorstore

        span = tensorstore.KvStore.KeyRange(after.encode(), before.encode())
        with _explained(self.url):
            found = self._store.list(span).result()
        return sorted(name.decode() for name in found)

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """The content of an object, None if there is none, and its generation."""
        with _explained(f"{self.url}/{name}"):
            found = self._store.read(name).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def read_range(self, name: str, at: int, size: int) -> tuple[bytes | None, bytes]:
        """The bytes `at` to `at + size` of an object that has them; else as `read`."""
        with _explained(f"{self.url}/{name}"):
            found = self._store.read(name, byte_range=slice(at, at + size)).result()
        return (found.value if found.state == "value" else None), found.stamp.generation

    def folder(self, inside: str = "") -> dict[str, Entry]:
        """The files and folders in a folder, by name; empty if there is no such folder."""
        import fsspec

        url = f"{self.url}/{inside}".rstrip("/")
        scheme, _, path = url.partition("://")
        with _explained(url):
            try:
                found = fsspec.filesystem(scheme).ls(path, detail=True)
            except FileNotFoundError:
                return {}
        entries = {each["name"].rstrip("/").rpartition("/")[2]: each for each in found}
        # A file of that name, and the object that some tools make for the folder, are not in it.
        return {
            name: Entry(None) if each["type"] == "directory" else _entry(each)
            for name, each in entries.items()
            if each["name"].startswith(f"{path}/") and each["name"] != f"{path}/"
        }

    def write(self, name: str, content: bytes, generation: bytes) -> bytes | None:
        """Writes an object if it still has this generation; returns the new one, or None."""
        with _explained(f"{self.url}/{name}"):
            made = self._store.write(name, content, if_equal=generation).result().generation
        if made:
            return made
        there, now = self.read(name)  # a retry finds what the first attempt wrote
        return now if there == content else None

    def replace(self, name: str, content: bytes) -> None:
        """Writes an object, whatever was there."""
        with _explained(f"{self.url}/{name}"):
            self._store.write(name, content).result()


def _entry(found: dict[str, Any]) -> Entry:
    """A file that fsspec lists; its generation as tensorstore writes it."""
    if "generation" in found:
        return Entry(found["size"], b"\0" + int(found["generation"]).to_bytes(8, "little"))
    return Entry(found["size"], b"\0" + str(found["ETag"]).encode())


def driver(url: str) -> dict[str, Any]:
    """tensorstore's spec of a folder: of gs://, s3:// and, for tests, file://."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    path = path and f"{path}/"
    if scheme == "file":
        return {"driver": "file", "path": f"{rest}/"}
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:  # asks no other place, which writes to the screen
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Context that says what a store's error means for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise explained(url, error) or error from error


def explained(url: str, error: BaseException) -> UserError | None:
    """What an error of a store's client means for the user; None if it is of another kind."""
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):  # with the same codes
        return None
    text = " ".join(str(error).split())
    brief = text if len(text) < 200 else f"{text[:200]} ..."
    kind = type(error).__name__
    scheme = url.partition("://")[0]
    code = str(getattr(error, "code", None) or getattr(error, "status", None) or "")
    credentials = ("DefaultCredentialsError", "RefreshError", "NoCredentialsError")
    refused = kind in credentials or any(sign in text for sign in _REFUSED)
    if refused or code in ("401", "403") or isinstance(error, PermissionError):
        return UserError(f"{url}: access is refused ({brief}). Log in with {_LOGIN.get(scheme)}")
    if any(sign in text for sign in _AGAIN) or code in ("429", "500", "502", "503", "504"):
        return Unreachable(
            f"{url} does not answer, after many attempts ({brief}): what was saved is whole; "
            "start the same command again when the store is back"
        )
    network = isinstance(error, (ConnectionError, TimeoutError)) or (
        type(error).__module__.partition(".")[0] in _NETWORK
        or (isinstance(error, OSError) and error.errno in _BUSY)
    )
    if network:
        return Unreachable(f"{url} cannot be reached ({kind}: {brief}): try again later")
    if "NOT_FOUND" in text or isinstance(error, FileNotFoundError):
        return UserError(f"{url}: there is no such bucket or object ({brief})")
    return None
