"""A folder at any URI, in which files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec

from ddoq_ray.config.paths import plain_path
from ddoq_ray.storage.json_rows import printed
from ddoq_ray.storage.transport import is_store_error, open_file, read_file, read_range, retried

TEMPORARY = ".tmp"


class Folder:
    """A folder at any URI that fsspec opens, in which files appear whole or not at all.

    On a local disk a file is written under a temporary name and renamed; on an object store one PUT is atomic.
    Small and picklable, so that actors on other nodes can publish too.
    """

    def __init__(self, uri: str) -> None:
        uri = plain_path(uri)
        self.uri = uri.rstrip("/") if "://" in uri else os.path.abspath(uri)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __truediv__(self, name: str) -> Folder:
        return Folder(posixpath.join(self.uri, name)) if name else self

    @property
    def local(self) -> bool:
        """Whether it is on this machine's file system (memory mapping and appending work there only)."""
        return "://" not in self.uri

    def path(self, name: str) -> str:
        return posixpath.join(self.uri, name) if name else self.uri

    def _fs(self, name: str = "") -> tuple[fsspec.AbstractFileSystem, str]:
        try:
            fs, root = fsspec.core.url_to_fs(self.path(name))
        except (ImportError, ValueError) as error:  # a library to install, or a protocol that nobody knows
            raise ValueError(f"{self.uri}: {error}; expected a folder of a disk, s3://... or gs://...") from error
        if not self.local:
            fs.invalidate_cache()  # listings of this process; others publish here too
        return fs, root

    def publish(self, name: str, data: bytes) -> None:
        """Write a file whole. Publishing the same file again is harmless.

        Raises:
            ValueError: When the place cannot be written.
        """
        with self.writing(name) as f:
            f.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """A file to write piece by piece, published when the block ends; nothing appears when it raises.

        It has a `name` on this machine's disk, wherever it is published: for libraries that write to a path.

        Raises:
            ValueError: When the place cannot be written.
        """
        try:
            fs, target = self._fs(name)
            if not self.local:
                # Not fs.open: leaving its block by an error would publish the part written so far.
                with tempfile.NamedTemporaryFile() as held:
                    yield held
                    held.flush()
                    retried(self.path(name), lambda: fs.put_file(held.name, target), "write")  # whole, or not at all
                return
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{target}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
            try:
                with open(temporary, "wb") as f:
                    yield f
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        except Exception as error:
            if not is_store_error(error):
                raise
            raise ValueError(write_error(self.path(name), error)) from error

    def sweep(self) -> None:
        """Remove what killed writers left: temporary files, here and below. An object store keeps no such thing."""
        if self.local:
            for place, _, files in os.walk(self.uri):
                for file in files:
                    if file.endswith(TEMPORARY):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(place, file))

    def publish_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, a line a fact, never held whole as text; a record may have `Rows`."""
        with self.writing(name) as f:
            for piece in printed(value):
                f.write(piece.encode())
            f.write(b"\n")

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: When it is not there.
            ValueError: When it may not be read, or its store fails again and again.
        """
        self._fs(name)
        with _told(self.path(name)):
            return read_file(self.path(name))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to before `end`; Raises as `read`."""
        self._fs(name)
        with _told(self.path(name)):
            return read_range(self.path(name), start, end)

    def size(self, name: str) -> int:
        """Bytes of a file; Raises as `read`."""
        fs, target = self._fs(name)
        with _told(self.path(name)):
            return int(retried(self.path(name), lambda: fs.size(target)))

    def modified(self, name: str) -> float | None:
        """When a file was last published, in seconds by the clock of its disk or store; None where that is not told."""
        try:
            fs, target = self._fs(name)
            return float(fs.modified(target).timestamp())
        except Exception:  # each store has errors of its own, and some keep no times
            return None

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """A file to read and seek in; Raises as `read`."""
        self._fs(name)
        with _told(self.path(name)):
            opened = open_file(self.path(name))
        with opened as f:
            yield f

    def digest(self, name: str) -> tuple[str, int]:
        """sha256 (hex) and size in bytes of a file, read piece by piece."""
        sha, size = hashlib.sha256(), 0
        with self.reading(name) as f:
            while piece := f.read(1 << 20):
                sha.update(piece)
                size += len(piece)
        return sha.hexdigest(), size

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def exists(self, name: str = "") -> bool:
        fs, target = self._fs(name)
        return retried(self.path(name), lambda: bool(fs.exists(target)))

    def names(self, pattern: str) -> list[str]:
        """Names, relative to this folder, that match a glob; sorted."""
        if self.local:  # fsspec would ask the disk for the facts of each file: of labels there are millions
            found = glob.glob(pattern, root_dir=self.uri, include_hidden=True)
            return sorted(name for name in found if not name.endswith(TEMPORARY))
        fs, target = self._fs(pattern)
        root = fs._strip_protocol(self.uri).rstrip("/") + "/"
        found = retried(self.path(pattern), lambda: fs.glob(target))
        return sorted(n.removeprefix(root) for n in found if not n.endswith(TEMPORARY))

    def sizes(self, pattern: str) -> dict[str, int]:
        """Bytes of each file that matches a glob, by its name as `names` has it; one listing."""
        if self.local:
            return {name: os.path.getsize(self.path(name)) for name in self.names(pattern)}
        fs, target = self._fs(pattern)
        root = fs._strip_protocol(self.uri).rstrip("/") + "/"
        found = retried(self.path(pattern), lambda: fs.glob(target, detail=True))
        return {n.removeprefix(root): int(found[n]["size"]) for n in sorted(found) if not n.endswith(TEMPORARY)}

    def remove(self, name: str = "") -> None:
        """Remove a file, or a folder with all in it; what is not there, or goes meanwhile by another hand, is gone.

        Raises:
            ValueError: The disk or the store refuses it again and again.
        """
        fs, target = self._fs(name)

        def request() -> None:
            while fs.exists(target):
                with contextlib.suppress(FileNotFoundError):  # one of its files went meanwhile: once more
                    fs.rm(target, recursive=True)
                    return

        retried(self.path(name), request, "remove")  # NFS, too, refuses a folder in which another has a file open

    def check_writable(self) -> None:
        """Raise ValueError now, not after hours of work, when nothing can be written here."""
        probe = f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            self.publish(probe, bytes(1 << 16))  # a full disk takes an empty file
        except ValueError as error:
            raise ValueError(str(error).replace(self.path(probe), self.uri)) from error.__cause__
        with contextlib.suppress(OSError, ValueError):
            self.remove(probe)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """What a disk says of a file that cannot be read, as `Folder.read` does."""
    try:
        yield
    except NotADirectoryError as error:  # a part of its path is a file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except (PermissionError, IsADirectoryError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def write_error(path: str, error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"cannot write {path}: {type(error).__name__}: {error}; choose another run_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {path} ({error.strerror}); choose another run_dir, or mend its permissions"
    if error.errno == errno.ENOTDIR or error.errno == errno.EEXIST:
        return f"cannot write {path}: a part of that path is a file, not a folder; choose another run_dir"
    return f"cannot write {path}: {error.strerror or error}; choose another run_dir"
