"""Objects in Google Cloud Storage and S3, read and written as wholes; what their errors mean."""

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from typing import Any

from vit_jax.errors import Unreachable, UserError

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
            context = tensorstore.Context(
                {"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES}
            )
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

    def delete(self, start: str) -> None:
        """Deletes all objects whose names start so, relative to the URL."""
        import tensorstore

        span = tensorstore.KvStore.KeyRange(
            start.encode(), f"{start[:-1]}{chr(ord(start[-1]) + 1)}"
        )
        with _explained(f"{self.url}/{start}"):
            self._store.delete_range(span).result()

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all objects, relative to the URL."""
        import fsspec

        with _explained(self.url):
            files, path = fsspec.core.url_to_fs(self.url)
            found = files.find(path, detail=True)
        inside = f"{path}/"
        return {
            name.removeprefix(inside): entry["size"]
            for name, entry in found.items()
            if name.startswith(inside)
        }


def driver(url: str) -> dict[str, Any]:
    """tensorstore's spec of a folder: of gs://, s3:// and, for tests, file://."""
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "file":
        return {"driver": "file", "path": f"{rest}/"}
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{path}/"}
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
