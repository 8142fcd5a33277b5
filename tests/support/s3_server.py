"""A real S3 server, and a road to it on which answers get lost and headers are taken away."""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest

from strata.store.feature_store import Store
from strata.store.fingerprint import fingerprint
from strata.store.level.layout import LevelKey, geometry
from strata.store.level.level import Level
from strata.store.s3.objects import Objects
from strata.store.s3.read_cache import ReadCache
from strata.store.s3.s3 import object_path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
ROOMY = 1 << 30


@contextmanager
def serving() -> Iterator[str]:
    """A server's URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(url: str) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    with urlopen(Request(f"{url}/{name}", method="PUT")) as answer:
        assert answer.status == 200
    return name


def use(monkeypatch: pytest.MonkeyPatch, url: str, attempts: int = 2) -> None:
    """Let this process, and those it starts, speak to a server."""
    for name, value in {**KEYS, "AWS_MAX_ATTEMPTS": str(attempts)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)


def connect(bucket: str, cache: Path | None = None, budget: int = ROOMY, **how: Any) -> Store:
    """A client of its own, as another process would have."""
    files = Objects(bucket, ReadCache(cache, budget) if cache else None, **how)
    return Store(object_path(f"s3://{bucket}/store"), files)


def contents(store: Store) -> dict[str, bytes]:
    """Every object below a store's prefix, by its name from there, without what lies beside."""
    found = store.files.listed(store.root) or {}
    kept = (n for n in sorted(found) if n.partition("/")[0] not in ("locks", "runs", "quarantine"))
    return {name: store.files.read(store.root / name) for name in kept}


@dataclass
class Road:
    """What happens to requests, by patterns of ``METHOD /bucket/key``."""

    url: str = ""
    lost: list[str] = field(default_factory=list)
    """The next answer to such a request does not come back; each once."""
    busy: list[str] = field(default_factory=list)
    """The next such request is told to slow down; each once."""
    stripped: tuple[str, ...] = ()
    """Headers that do not arrive."""
    slow: str = "$^"
    """Such a request takes half a second longer."""
    seen: list[str] = field(default_factory=list)
    """Requests that were answered by the server."""

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.seen)


@contextmanager
def road(target: str) -> Iterator[Road]:
    """A proxy before a server."""
    way, place = Road(), target.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet, or each answer waits for an ACK
        disable_nagle_algorithm = True

        def answer(self) -> None:
            line = f"{self.command} {self.path}"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if re.search(way.slow, line):
                time.sleep(0.5)
            for pattern in way.busy:
                if re.search(pattern, line):
                    way.busy.remove(pattern)
                    self.send_error(503, explain="<Code>SlowDown</Code>")
                    return
            kept = {k: v for k, v in self.headers.items() if k.lower() not in way.stripped}
            server = http.client.HTTPConnection(place)
            server.request(self.command, self.path, body, kept)
            there = server.getresponse()
            data = there.read()
            server.close()
            way.seen.append(line)
            for pattern in way.lost:
                if re.search(pattern, line):
                    way.lost.remove(pattern)
                    self.close_connection = True
                    return
            self.send_response_only(there.status)
            for name, value in there.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = there.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    way.url = f"http://127.0.0.1:{proxy.server_address[1]}"
    try:
        yield way
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()


# ---- a level to write ---------------------------------------------------------------------------

INTENT = {"what": "a level of a test"}
KEY = LevelKey(1, fingerprint(INTENT), "train", "v0")
ROWS = 500
VALUES = np.random.default_rng(0).integers(0, 9, (ROWS, 3, 8, 8)).astype(np.float32)
TOOL = {"strata": "test"}


def shape(profile: str = "zstd"):
    return geometry(ROWS, (3, 8, 8), "float32", 1 << 16, profile)


def write(store: Store, values: np.ndarray = VALUES, profile: str = "zstd") -> Level:
    writer = store.writer(KEY, shape(profile), [INTENT])
    with writer.locked():
        writer.fill((k, values[slice(*shape(profile).shard_range(k))]) for k in writer.missing())
        return writer.commit(None, {"label": np.arange(ROWS)}, TOOL)
