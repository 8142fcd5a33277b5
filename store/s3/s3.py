"""S3, and what speaks its language, by obstore: files of one bucket, errors in one line each.

This is the one file that imports obstore, so whoever may do without imports this one late.

Where it is and who we are comes from the environment, as for other tools: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; AWS_MAX_ATTEMPTS bounds how
often a request is made.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import S3Store

from strata.store.errors import StoreRefused
from strata.store.files.files import WholeFiles

ATTEMPTS = 5
CONNECT, REQUEST, RETRYING = timedelta(seconds=5), timedelta(minutes=10), timedelta(minutes=2)
"""At most: to reach the server, for a shard in one request, for a request and its repetitions."""
PIECE = 8 << 20
CONDITIONAL, ALONE = "", "1"
"""Values of ``?writers=``: several, which the server keeps apart; or one, who says so."""

REASONS = (
    ("NoSuchBucket", "there is no such bucket"),
    (
        "169.254.169.254|/latest/(api|meta)|[Cc]redential",
        "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    ("SlowDown|: 503|: 429", "it asks for fewer requests, also after waiting"),
    ("AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|: 403|: 401", "access is denied"),
    ("error sending request|timed out|connect|dns", "it cannot be reached"),
)
"""Patterns of the server's answer, and what people are told; the first that matches counts."""


class ObjectPath(PurePosixPath):
    """``s3://bucket/prefix/x_1-…``: a path whose name people can paste. It has nothing of
    ``Path`` that looks at a disk, so whoever forgets where it lies meets an error."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def absolute(self) -> ObjectPath:
        return self


def object_path(text: str) -> Path:
    """The path of ``s3://bucket/prefix``; a ``Path`` as far as names go, and no further."""
    return cast(Path, ObjectPath(text))


def key_of(path: Path) -> str:
    """The key of an object inside of its bucket."""
    return "/".join(path.parts[2:])


class S3Bucket(WholeFiles):
    """Objects of one bucket, under the names that files would have. A request raises
    ``FileNotFoundError`` where there is no such object, and StoreRefused where the server refuses
    or is not to be had."""

    def __init__(self, name: str, *, conditional: bool = True) -> None:
        """Asks for nothing yet. Raises StoreRefused if the environment makes no sense.

        Args:
            conditional: does the server check conditions? False: whoever writes must be alone.
        """
        self.name, self.conditional = f"s3://{name}", conditional
        self._attempts, self._known = _attempts(), False
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")
        self._where = f" at {endpoint}" if endpoint else ""
        config: dict[str, Any] = {"checksum_algorithm": "SHA256"}
        if endpoint:
            config["endpoint"] = endpoint
        if not {"AWS_REGION", "AWS_DEFAULT_REGION"} & set(os.environ):
            config["region"] = "us-east-1"
        try:
            self._store = S3Store(
                name,
                config=config,  # pyright: ignore[reportArgumentType]
                client_options={
                    "allow_http": bool(endpoint and endpoint.startswith("http://")),
                    "connect_timeout": CONNECT,
                    "timeout": REQUEST,
                },
                retry_config={"max_retries": self._attempts - 1, "retry_timeout": RETRYING},
            )
        except (BaseError, ValueError) as error:
            raise StoreRefused(f"{self.name}{self._where}: {_first_line(error)}") from error

    # ---- writing --------------------------------------------------------------------------------

    def put(self, path: Path, data: bytes) -> None:
        self._put(path, data, "overwrite")

    def put_exclusive(self, path: Path, data: bytes) -> bool:
        if not self.conditional:
            if (there := self._found(path)) is not None:
                return there == data
            self._put(path, data, "overwrite")
            return True
        for left in reversed(range(self._attempts)):
            try:
                self._put(path, data, "create")
                return True
            except (FileExistsError, StoreRefused) as error:  # perhaps after the server obeyed
                if self._found(path) == data:
                    return True
                if isinstance(error, FileExistsError):
                    return False
                if not left:
                    raise
        raise AssertionError("the last attempt has raised")

    def _put(self, path: Path, data: bytes, mode: Any) -> None:
        with self._refusals(path):
            obstore.put(self._store, key_of(path), data, mode=mode, use_multipart=False)

    def _found(self, path: Path) -> bytes | None:
        """The bytes of an object; None if there is none."""
        with suppress(FileNotFoundError):
            return self.read(path)
        return None

    def unlink(self, path: Path) -> None:
        self.delete([path])

    def delete(self, paths: Sequence[Path]) -> None:
        """Remove objects, those that are there."""
        if paths:
            with self._refusals(paths[0]), suppress(FileNotFoundError):
                obstore.delete(self._store, [key_of(path) for path in paths])

    def copy(self, path: Path, target: Path) -> None:
        """Have an object under a second name, whatever was there."""
        with self._refusals(path):
            obstore.copy(self._store, key_of(path), key_of(target))

    # ---- looking --------------------------------------------------------------------------------

    def read(self, path: Path) -> bytes:
        with self._refusals(path):
            return bytes(obstore.get(self._store, key_of(path)).bytes())

    def stream(self, path: Path) -> Iterator[memoryview]:
        """The bytes of an object in pieces, in their order."""
        with self._refusals(path):
            for piece in obstore.get(self._store, key_of(path)).stream(min_chunk_size=PIECE):
                yield memoryview(piece)

    def part(self, path: Path, begin: int, nbytes: int) -> memoryview:
        """Some bytes of an object; fewer where it ends before."""
        with self._refusals(path):
            found = obstore.get_range(self._store, key_of(path), start=begin, length=nbytes)
            return memoryview(found)

    def size(self, path: Path) -> int:
        with self._refusals(path):
            return obstore.head(self._store, key_of(path))["size"]

    def listed(self, directory: Path) -> dict[str, int]:
        prefix = key_of(directory)
        with self._refusals(directory):
            return {
                facts["path"].removeprefix(f"{prefix}/"): facts["size"]
                for batch in obstore.list(self._store, prefix or None)
                for facts in batch
            }

    def names(self, directory: Path) -> list[str]:
        with self._refusals(directory):
            found = obstore.list_with_delimiter(self._store, key_of(directory) or None)
            paths = [*found["common_prefixes"], *(facts["path"] for facts in found["objects"])]
            return sorted(path.rpartition("/")[2] for path in paths)

    def is_directory(self, path: Path) -> bool:
        """Is there any object below a name?"""
        with self._refusals(path):
            return any(obstore.list(self._store, key_of(path) or None, chunk_size=1))

    # ---- what the server refuses ----------------------------------------------------------------

    @contextmanager
    def _refusals(self, path: Path) -> Iterator[None]:
        """A server that refuses, or is not there, in one line. That an object is not there is for
        the caller, unless it is because the bucket is not."""
        self._look()
        try:
            yield
        except (AlreadyExistsError, PreconditionError) as error:
            raise FileExistsError(str(path)) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._refused(error) from error
            raise FileNotFoundError(str(path)) from error
        except BaseError as error:
            raise self._refused(error) from error

    def check_conditions(self, directory: Path) -> None:
        """Put one name twice: does the server refuse the second?

        Raises:
            StoreRefused: it does not, so that of two writers one would overwrite what the other has
                vouched for.
        """
        path = directory / f"probe-{uuid.uuid4().hex}"
        try:
            self.put_exclusive(path, b"first")
            overwritten = self.put_exclusive(path, b"second")
        finally:
            self.unlink(path)
        if overwritten:
            raise StoreRefused(
                f"{self.name}: the server overwrites where it was told not to (it ignores "
                "If-None-Match), so several writers are refused. If this is the only one, say so: "
                "--store 's3://…?writers=1'"
            )

    def _look(self) -> None:
        """Once: of a bucket that is not there, a look for one object says only that that is not."""
        if self._known:
            return
        try:
            next(iter(obstore.list(self._store, chunk_size=1)), None)
        except BaseError as error:
            raise self._refused(error) from error
        self._known = True

    def _refused(self, error: Exception) -> StoreRefused:
        line = _first_line(error)
        why = next((why for pattern, why in REASONS if re.search(pattern, str(error))), line)
        return StoreRefused(f"{self.name}{self._where}: {why}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _attempts() -> int:
    text = os.environ.get("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
    if not text.isdigit() or text == "0":
        raise StoreRefused(f"AWS_MAX_ATTEMPTS is {text!r}; it must be a number from 1 on")
    return int(text)


def parsed(url: str) -> tuple[str, str, bool]:
    """Bucket, prefix, and whether several may write, of ``s3://bucket/prefix?writers=1``. Raises
    ValueError if it is none."""
    parts = urlsplit(url)
    query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    writers = query.pop("writers", [CONDITIONAL])
    if parts.scheme != "s3" or not parts.netloc or query or writers[0] not in (CONDITIONAL, ALONE):
        raise ValueError(f"{url!r} is no s3://BUCKET/PREFIX, nor that with ?writers=1")
    return parts.netloc, parts.path.strip("/"), writers[0] == CONDITIONAL
