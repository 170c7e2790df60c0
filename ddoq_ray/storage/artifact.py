"""The run directory: files published whole, one manifest a stage, and the rule for resuming.

A stage's life: `Artifact.begin(identity)` says whether its output is `done` (a manifest with the same identity),
`open` (begun with the same identity and cut off) or new; the stage publishes its files; `Artifact.finish` writes
``manifest.json`` last. Another identity in the same place is an error that names the differing keys; with
`overwrite` the output that differs is removed and made anew.
"""

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
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

import fsspec

from ddoq_ray.config.paths import plain_path
from ddoq_ray.storage import layout
from ddoq_ray.storage.transport import is_store_error

Status = Literal["new", "open", "done"]

TEMPORARY = ".tmp"


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest_of(value: Any) -> str:
    """sha256 (hex) of bytes, or of the canonical JSON of anything else."""
    data = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(data).hexdigest()


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
        fs, root = fsspec.core.url_to_fs(self.path(name))
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
                    fs.put_file(held.name, target)
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
        text = json.dumps(value, indent=1, sort_keys=True, default=str, allow_nan=False)  # NaN is no JSON
        self.publish(name, (text + "\n").encode())

    def read(self, name: str) -> bytes:
        fs, target = self._fs(name)
        return bytes(fs.cat_file(target))

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """A file to read piece by piece."""
        fs, target = self._fs(name)
        with fs.open(target, "rb") as f:
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
        return bool(fs.exists(target))

    def names(self, pattern: str) -> list[str]:
        """Names, relative to this folder, that match a glob; sorted."""
        if self.local:  # fsspec would ask the disk for the facts of each file: of labels there are millions
            found = glob.glob(pattern, root_dir=self.uri, include_hidden=True)
            return sorted(name for name in found if not name.endswith(TEMPORARY))
        fs, target = self._fs(pattern)
        root = fs._strip_protocol(self.uri).rstrip("/") + "/"
        return sorted(n.removeprefix(root) for n in fs.glob(target) if not n.endswith(TEMPORARY))

    def remove(self, name: str = "") -> None:
        fs, target = self._fs(name)
        if fs.exists(target):
            fs.rm(target, recursive=True)

    def check_writable(self) -> None:
        """Raise ValueError now, not after hours of work, when nothing can be written here."""
        probe = f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            self.publish(probe, bytes(1 << 16))  # a full disk takes an empty file
        except ValueError as error:
            raise ValueError(str(error).replace(self.path(probe), self.uri)) from error.__cause__
        with contextlib.suppress(OSError):
            self.remove(probe)


def write_error(path: str, error: Exception) -> str:
    if not isinstance(error, OSError):
        return f"cannot write {path}: {type(error).__name__}: {error}; choose another run_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {path} ({error.strerror}); choose another run_dir, or mend its permissions"
    if error.errno == errno.ENOTDIR or error.errno == errno.EEXIST:
        return f"cannot write {path}: a part of that path is a file, not a folder; choose another run_dir"
    return f"cannot write {path}: {error.strerror or error}; choose another run_dir"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif canonical(a) != canonical(b):
            lines.append(f"{name}: {canonical(a)} there, {canonical(b)} now")
    return lines


def _part(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recorded identity what `asked` has keys for, nested mappings too."""
    part = {}
    for key, value in asked.items():
        there = recorded.get(key)
        part[key] = _part(there, value) if isinstance(there, Mapping) and isinstance(value, Mapping) else there
    return part


class Artifact:
    """A stage's output folder with its `started.json` and `manifest.json`."""

    def __init__(self, folder: Folder, stage: str, *, command: str | None = None) -> None:
        """`stage` is the word in its manifest; `command` the stage's command, where that is another word."""
        self.folder = folder
        self.stage = stage
        self.command = command or stage

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished output; None when there is none."""
        try:
            return self.folder.read_json(layout.MANIFEST)
        except FileNotFoundError:
            return None

    def _recorded(self) -> tuple[dict[str, Any] | None, Status]:
        manifest = self.manifest()
        if manifest is not None:
            return manifest["identity"], "done"
        try:
            return self.folder.read_json(layout.STARTED)["identity"], "open"
        except FileNotFoundError:
            return None, "new"

    def check(self, identity: Mapping[str, Any], *, partial: bool = False) -> Status:
        """Compare what is there with what is wanted, as far as `identity`'s keys go; write nothing.

        Args:
            partial: The identity is what is known so far: nested mappings, too, are compared as far as its keys go.

        Raises:
            ValueError: When the folder holds the output of another configuration or of other inputs.
        """
        recorded, status = self._recorded()
        if recorded is None:
            return "new"
        there = _part(recorded, identity) if partial else {k: recorded.get(k) for k in identity}
        lines = differences(there, identity)
        if lines:
            raise ValueError(
                f"{self.folder.uri} holds the {self.stage} stage of another configuration:\n  "
                + "\n  ".join(lines[:12])
                + "\nTo go on with what is there, give the keys that it was made with, a single stage's too (the run "
                "directory's config.yaml holds them: `path: x` below `dataset:` is dataset.path=x). Else use another "
                "run_dir, or overwrite=true to make this stage and all after "
                "it anew."
            )
        return status

    def begin(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> Status:
        """`check`, then record that this identity has begun. With `overwrite`, an output that differs goes first."""
        try:
            status = self.check(identity)
        except ValueError:
            if not overwrite:
                raise
            self.folder.remove()
            status = "new"
        if status == "new":
            self.folder.publish_json(layout.STARTED, {"stage": self.stage, "identity": identity})
        return status

    def finish(self, identity: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Publish the manifest: the identity, its digest, and facts such as seconds, items, bytes and digest.

        The output is complete then, so what killed or late writers left behind is removed first.
        """
        self.folder.sweep()
        manifest = {"stage": self.stage, "identity": identity, "identity_digest": digest_of(identity), **facts}
        self.folder.publish_json(layout.MANIFEST, manifest)
        return manifest

    def done(self, identity: Mapping[str, Any]) -> bool:
        """Whether the output of exactly this identity is finished; write nothing, raise nothing."""
        recorded, status = self._recorded()
        return status == "done" and recorded is not None and not differences(recorded, identity)

    def require(self) -> dict[str, Any]:
        """The manifest, or a clear error that says which stage to run first."""
        manifest = self.manifest()
        if manifest is None:
            raise ValueError(
                f"{self.folder.uri} is not finished: run the {self.command} stage first (ddoq-ray {self.command} ...)"
            )
        return manifest
