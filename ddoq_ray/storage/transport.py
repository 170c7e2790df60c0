"""Files wherever they are: found by name, and read so that a bad network cannot cut them short.

Anything that fsspec opens will do: local paths, ``s3://``, ``gs://``, ``memory://``. A store of one's own is named as
its libraries want it: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY`` for S3 (or a profile, or
the machine's role); for Google ``GOOGLE_APPLICATION_CREDENTIALS`` (``FSSPEC_GS_TOKEN=anon`` for a public bucket), and
``STORAGE_EMULATOR_HOST`` for a server that speaks its language. On a cluster every node needs them.

A large object is read in blocks, each by a request of its own: what fails is asked for again, and no byte comes twice.
The object's own size says where it ends: fewer bytes than that are an error of the transport, never the end of a tar.
Every file that is not one of this machine's own is read by `open_file`, `open_shard`, `read_file` or `read_range`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import posixpath
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import IO, Any, TypeVar

import braceexpand
import fsspec

T = TypeVar("T")

BLOCK_BYTES = 8 << 20  # one request: large enough to hide its latency, small enough to lose little
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the 2nd to the 6th try; each up to half as long again, by chance

# Errors of these libraries that are no OSError are the network's; anything else is a bug and is not tried again.
_NETWORK_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "http", "requests", "urllib3")
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

if os.environ.get("STORAGE_EMULATOR_HOST"):
    # gcsfs reads this as it is imported. Without it, it asks for a bucket's kind by gRPC before each request, which
    # only Google answers: a minute each time.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def list_shards(path: str, *, key: str = "dataset.path") -> list[str]:
    """The tar shards of a folder, a glob or a brace pattern, sorted by name.

    Args:
        path: A folder (its ``*.tar``), a glob, or a brace pattern such as ``train-{0000..0099}.tar``;
            local or a URL that fsspec opens.
        key: The configuration key to name in an error.

    Raises:
        ValueError: When the path does not exist, cannot be listed, or holds no shard.
    """
    found: list[str] = []
    # Brackets and braces may be part of a name that is there.
    for pattern in [path] if "://" not in path and os.path.exists(path) else _patterns(path, key):
        try:
            names = retried(pattern, partial(_matches, pattern, f"{key}={path}"))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{key}={path}: cannot be listed: {_words(error)}") from error
        found += names
    if not found:
        raise ValueError(f"{key}={path}: no shard matches; expected WebDataset tar shards (*.tar)")
    return list(dict.fromkeys(found))  # patterns may meet in one shard; it is one all the same


def _patterns(path: str, key: str) -> list[str]:
    """The patterns of a brace pattern.

    Raises:
        ValueError: When it is none, or lists places as other programs do: all but one of them would be lost.
    """
    first, several, _ = path.partition("::")
    if several and ("/" in first or first.endswith(".tar")):  # fsspec's own chains begin with a bare protocol
        raise ValueError(f"{key}={path}: places are not listed by `::`; write {{first,second}}, or a glob")
    try:
        return list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise ValueError(
            f"{key}={path} is no brace pattern: {error}; expected such as train-{{0000..0099}}.tar"
        ) from error


def _matches(pattern: str, asked: str) -> list[str]:
    try:
        fs, root = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # a library to install, or a protocol that nobody knows
        raise ValueError(f"{asked}: {error}") from error
    fs.invalidate_cache()  # listings of this process, to which others may have added
    try:
        there = _is_local(fs) and os.path.exists(root)
        if not there and any(ch in root for ch in "*?["):
            names = sorted(fs.glob(root))
        elif _is_folder(fs, root):
            inside = glob.escape(root) if there else root
            names = sorted(fs.glob(inside.rstrip("/") + "/*.tar"))
            if not names:
                raise ValueError(f"{asked}: the folder {root} holds no *.tar shard")
        else:
            names = [root]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{asked}: {root} does not exist; expected a folder, glob or brace pattern of WebDataset tar shards"
        ) from error
    return [name if _is_local(fs) else str(fs.unstrip_protocol(name)) for name in names]


def _is_folder(fs: Any, root: str) -> bool:
    """Whether it is a folder; FileNotFoundError when it is not there.

    `isdir` alone takes a request that failed for a no. `info` alone takes a folder of a web server for a file.
    """
    return fs.info(root)["type"] == "directory" or fs.isdir(root)


@contextlib.contextmanager
def open_shard(url: str, buffer: int = -1) -> Iterator[IO[bytes]]:
    """A shard to read and seek in, from its first byte on.

    Args:
        buffer: Bytes that are read of a local file at once; by default the library's. Of a store it is blocks.

    Raises:
        ValueError: Here or in reading, when it cannot be read: the store refuses it, or every try failed.
    """
    try:
        with open_file(url, buffer) as f:
            yield f
    except Exception as error:
        if not isinstance(error, ImportError) and not is_store_error(error):
            raise
        raise ValueError(f"cannot read {url}: {_words(error)}") from error


def open_file(url: str, buffer: int = -1) -> IO[bytes]:
    """A file to read and seek in; `buffer` as in `open_shard`.

    Raises:
        OSError: When it is not there or may not be read, as a disk says it (FileNotFoundError, PermissionError).
        ValueError: Here or in reading, when every try failed.
    """
    fs, root = _place(url)
    if _is_local(fs):
        return open(root, "rb", buffering=buffer)
    size = retried(url, lambda: fs.size(root))
    if size is None:
        raise ValueError(f"cannot read {url}: its store does not tell its size; copy it to a disk, S3 or Google store")
    return io.BufferedReader(_RemoteFile(url, int(size)), 1 << 16)


def read_file(url: str) -> bytes:
    """All bytes of a file, by one request.

    Raises:
        OSError: As `open_file`.
        ValueError: When every try failed.
    """
    fs, root = _place(url)
    if _is_local(fs):
        return _of_disk(partial(_all_bytes, root))

    def request() -> bytes:
        size, data = fs.size(root), bytes(fs.cat_file(root))
        if size is not None and len(data) != size:  # a web server may not tell a size
            fs.invalidate_cache()  # whoever wrote the file anew meanwhile has changed its size
            raise OSError(f"a short read: {len(data)} of {size} bytes")
        return data

    return retried(url, request)


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes of a file from `start` to before `end`, by one request.

    Raises:
        OSError, ValueError: As `read_file`.
    """
    fs, root = _place(url)

    def request() -> bytes:
        data = bytes(fs.cat_file(root, start=start, end=end))
        if len(data) != end - start:
            raise OSError(f"a short read: {len(data)} of the {end - start} bytes from byte {start} on")
        return data

    return _of_disk(request) if _is_local(fs) else retried(url, request)


def _all_bytes(path: str) -> bytes:
    with open(path, "rb") as f:
        return f.read()


def _of_disk(read: Callable[[], T]) -> T:
    """`read()`, once more where NFS says that another machine has put a new file in the place of the one at hand.

    A unit that is done twice publishes the same bytes twice; whoever is reading the first file then holds none.
    """
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return read()


def read_heads(root: str, names: Sequence[str], length: int) -> list[bytes]:
    """The first bytes of files below a root, many by one call; none of those that cannot be read."""
    fs, place = _place(root)
    paths = [posixpath.join(place, name) for name in names]

    def request() -> list[bytes]:
        heads = fs.cat_ranges(paths, [0] * len(paths), [length] * len(paths), on_error="return")
        for head in heads:
            if isinstance(head, BaseException) and is_transient(head):
                raise head
        return [head if isinstance(head, bytes) else b"" for head in heads]

    return retried(root, request) if paths else []


def retried(url: str, call: Callable[[], T], what: str = "read") -> T:
    """`call()`, again after a wait as long as it fails by what may pass: `len(WAITS)` times at most.

    Args:
        what: Is done with it, for the error.

    Raises:
        ValueError: When the last try failed too.
        Exception: At once, what another try cannot mend.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            if wait is None:
                raise ValueError(
                    f"cannot {what} {url}: {len(WAITS) + 1} tries over {sum(WAITS):.0f} s or more failed, the last by "
                    f"{_words(error)}; when the store answers again, run again: what is done stays"
                ) from error
            time.sleep(wait * random.SystemRandom().uniform(1, 1.5))  # else a thousand readers come back at once
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a timeout, a cut connection, a 5xx, a short read."""
    if isinstance(error, _PERMANENT) or (type(error) is OSError and str(error).startswith("Forbidden: ")):  # gcsfs: 403
        return False
    if isinstance(error, OSError | EOFError):  # TimeoutError and ConnectionError are OSErrors
        return True
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int):
        return status in (408, 429) or status >= 500
    name = type(error).__name__
    return is_store_error(error) and "Credentials" not in name and "NonRetryable" not in name


def is_store_error(error: BaseException) -> bool:
    """Whether a disk, a network or a store has failed or refused: an OSError, or an error of a store's library."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES


class _RemoteFile(io.RawIOBase):
    """An object as a file: one block in hand, the next one on its way while this one is decoded."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._at = 0
        self._index, self._block = -1, b""
        self._next: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1, "shard")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        index, start = divmod(self._at, BLOCK_BYTES)
        if index != self._index:
            self._take(index)
        data = memoryview(self._block)[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _take(self, index: int) -> None:
        sequential = index == self._index + 1
        coming, self._next = self._next, None
        self._block = b""  # two blocks in memory, not three
        if coming is not None and coming[0] == index:
            self._block = coming[1].result()
        else:
            self._block = self._fetch(index)
        self._index = index
        if sequential and (index + 1) * BLOCK_BYTES < self._size:
            self._next = (index + 1, self._thread.submit(self._fetch, index + 1))

    def _fetch(self, index: int) -> bytes:
        start = index * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self._size)

        try:
            return read_range(self._url, start, end)
        except Exception as error:  # what no try mends; an OSError would pass for a damaged tar further up
            if not is_store_error(error):
                raise
            raise ValueError(f"cannot read {self._url}: {_words(error)}") from error


def _place(url: str) -> tuple[Any, str]:
    """(the file system, its own name of a file); `::` inside a name is no chain: those begin with a bare protocol."""
    first, several, rest = url.partition("::")
    if not several or "/" not in first:
        first, several, rest = url, "", ""
    fs, root = fsspec.core.url_to_fs(first)
    return fs, root + several + rest


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
