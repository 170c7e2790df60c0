"""Reading through a store that fails: every byte comes once and in order, or the run fails by the shard's name."""

from __future__ import annotations

import errno
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ddoq_ray.data.collections import folders, metadata, table_columns
from ddoq_ray.data.collections.idx import Idx
from ddoq_ray.data.image_set import NewImage, read_images, write_images
from ddoq_ray.data.samples import encode_png, read_classes, read_samples
from ddoq_ray.data.shard_index import index_shard
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage import transport
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.transport import (
    BLOCK_BYTES,
    WAITS,
    is_store_error,
    is_transient,
    list_shards,
    open_file,
    open_shard,
    read_file,
    read_heads,
    read_range,
    retried,
)


class Flaky(MemoryFileSystem):
    """A store in memory; each request takes the next of `faults`: an error to raise, or the bytes to leave out."""

    protocol = "flaky"
    cachable = False
    faults: list[Exception | int | None] = []  # noqa: RUF012 (of the class on purpose: instances come and go)
    requests: list[tuple[int | None, int | None]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.requests.append((start, end))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        data = super().cat_file(path, start=start, end=end, **kwargs)
        return data[: len(data) - fault] if fault else data

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))


fsspec.register_implementation("flaky", Flaky, clobber=True)
CONTENT = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8).tobytes()


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An object of 10,000 bytes, read in blocks of 1,000; nobody waits."""
    monkeypatch.setattr(transport, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(transport, "WAITS", (0.0,) * len(WAITS))
    MemoryFileSystem().pipe_file("/store/x.tar", CONTENT)
    Flaky.faults, Flaky.requests = [], []
    yield "flaky://store/x.tar"
    Flaky.faults = []
    MemoryFileSystem().rm("/store", recursive=True)


FAULTS = [ConnectionResetError("reset"), TimeoutError("slow"), OSError(16, "503 SlowDown"), 1, 999, 1000]


def test_faults_leave_no_trace_in_the_stream(url: str) -> None:
    Flaky.faults = [f for fault in FAULTS for f in (fault, None)]
    with open_shard(url) as f:
        pieces = list(iter(lambda: f.read(777), b""))
    assert b"".join(pieces) == CONTENT
    assert len(Flaky.requests) == 10 + len(FAULTS)
    assert not Flaky.faults


def test_a_read_takes_up_where_it_stopped(url: str) -> None:
    with open_shard(url) as f:
        f.read(2500)
        Flaky.requests.clear()
        Flaky.faults = [ConnectionResetError()] * 3
        f.read(7500)
    starts = [start for start, _ in Flaky.requests]
    assert min(starts) >= 3000 and len(starts) == len(set(starts)) + 3


def test_seeks(url: str) -> None:
    rng = np.random.default_rng(1)
    with open_shard(url) as f:
        assert f.seek(0, io.SEEK_END) == len(CONTENT) and f.read(5) == b""
        for at, n in zip(rng.integers(0, 10_100, 50).tolist(), rng.integers(0, 3000, 50).tolist(), strict=True):
            assert f.seek(at) == at
            assert f.read(n) == CONTENT[at : at + n], (at, n)
            assert f.tell() == max(at, min(at + n, len(CONTENT)))


def test_in_order_no_block_is_asked_for_twice(url: str) -> None:
    with open_shard(url) as f:
        f.read()
    assert sorted(Flaky.requests) == [(i, i + 1000) for i in range(0, 10_000, 1000)]


def test_after_the_last_try_it_fails_by_name(url: str) -> None:
    Flaky.faults = [ConnectionResetError("by peer")] * (len(WAITS) + 1)
    with open_shard(url) as f, pytest.raises(ValueError, match=r"flaky://store/x.tar: 6 tries .* by peer.*run again"):
        f.read()
    Flaky.faults = [ConnectionResetError("by peer")] * len(WAITS)
    with open_shard(url) as f:
        assert f.read() == CONTENT


def test_what_no_try_mends_is_not_tried_again(url: str) -> None:
    for error in (PermissionError("403"), FileNotFoundError("gone")):
        Flaky.faults, Flaky.requests = [error], []
        with open_shard(url) as f, pytest.raises(ValueError, match=r"cannot read flaky://store/x.tar: .*(403|gone)"):
            f.read()
        assert len(Flaky.requests) == 1
    with (
        pytest.raises(ValueError, match=r"cannot read flaky://store/y.tar: FileNotFoundError"),
        open_shard("flaky://store/y.tar"),
    ):
        pass
    with pytest.raises(ValueError, match=r"cannot read /no/x.tar: FileNotFoundError"), open_shard("/no/x.tar"):
        pass


def test_a_store_that_nothing_opens_is_named() -> None:
    with pytest.raises(ValueError, match=r"dataset.path=ftpx://a/b.tar: Protocol not known: ftpx"):
        list_shards("ftpx://a/b.tar")


def test_a_folder_of_a_web_server_is_listed(tmp_path: Path) -> None:
    """Its page of links; for the library it is a file as well."""
    (tmp_path / "train").mkdir()
    for name in ("b.tar", "a.tar", "notes.txt"):
        (tmp_path / "train" / name).write_bytes(b"")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train/"
        assert list_shards(url) == list_shards(f"{url}*.tar") == [f"{url}a.tar", f"{url}b.tar"]
        assert list_shards(f"{url}a.tar") == [f"{url}a.tar"]
        with pytest.raises(ValueError, match=r"x.tar does not exist"):
            list_shards(f"{url}x.tar")
        server.shutdown()


class _Answer(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True), (ConnectionResetError(), True), (OSError("EIO"), True), (EOFError(), True),
        (FileNotFoundError(), False), (PermissionError(), False), (TypeError(), False), (ValueError(), False),
        (_Answer(503), True), (_Answer(429), True), (_Answer(408), True), (_Answer(404), False), (_Answer(403), False),
        (OSError("Forbidden: b/x/o"), False), (OSError("503 Forbidden"), True),
    ],
)  # fmt: skip
def test_transient(error: Exception, expected: bool) -> None:
    assert is_transient(error) == expected


def test_network_libraries_errors_are_transient_but_missing_credentials_are_not() -> None:
    from http.client import IncompleteRead

    from aiohttp import ClientPayloadError
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    assert all(
        map(is_transient, [IncompleteRead(b""), ClientPayloadError(), EndpointConnectionError(endpoint_url="http://x")])
    )
    assert not is_transient(NoCredentialsError())


def test_googles_errors() -> None:
    """As gcsfs raises them; its 403 is a bare OSError."""
    from gcsfs.retry import ChecksumError, HttpError, NonRetryableError, validate_response
    from google.auth.exceptions import DefaultCredentialsError

    for status in (400, 401, 403, 404, 408, 429, 500, 502, 503, 504):
        for content in (b"", b"words", b'{"error": {"code": %d, "message": "words"}}' % status):
            with pytest.raises(Exception) as caught:
                validate_response(status, content, "b/x/o")
            assert is_store_error(caught.value)
            assert is_transient(caught.value) == (status in (408, 429) or status >= 500), (status, caught.value)
    assert is_transient(ChecksumError()) and is_transient(HttpError({"code": 503}))
    assert not is_transient(NonRetryableError()) and not is_transient(DefaultCredentialsError("none"))


def test_a_refusal_of_a_stores_library_is_named(url: str) -> None:
    """Such errors are no OSErrors."""
    from botocore.exceptions import NoCredentialsError
    from gcsfs.retry import HttpError

    for error in (HttpError({"code": 401, "message": "Anonymous caller"}), NoCredentialsError()):
        Flaky.faults, Flaky.requests = [error], []
        with open_shard(url) as f, pytest.raises(ValueError, match=rf"cannot read {url}: (Http|NoCredentials)Error: "):
            f.read()
        assert len(Flaky.requests) == 1


def test_waits_grow_and_are_stated() -> None:
    assert list(WAITS) == sorted(WAITS) and len(WAITS) == 5 and 10 < sum(WAITS) < 60
    assert BLOCK_BYTES == 8 << 20
    calls = []
    with pytest.raises(TypeError):
        retried("x", lambda: calls.append(1) or int([]))  # type: ignore[func-returns-value, call-overload]
    assert calls == [1]


# Shards


@pytest.mark.parametrize("faults", [FAULTS[:5], FAULTS[1:]])
def test_a_whole_file_and_a_range_of_it_through_faults(url: str, faults: list[Any]) -> None:
    for read, expected in (
        (partial(read_file, url), CONTENT),
        (partial(read_range, url, 7, 1007), CONTENT[7:1007]),
        (partial(Folder("flaky://store").read, "x.tar"), CONTENT),
        (partial(read_heads, "flaky://store", ["x.tar"], 1000), [CONTENT[:1000]]),
    ):
        Flaky.faults = list(faults) if read.func is not read_heads else [f for f in faults if isinstance(f, Exception)]
        assert read() == expected and not Flaky.faults
    with Folder("flaky://store").reading("x.tar") as f:
        assert f.read() == CONTENT


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_another_machine_replaces_meanwhile_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """NFS answers a read of a file that is no longer there, though one of its name is, with ESTALE."""
    left = [times]

    class Replaced(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().read(size)

    (tmp_path / "x").write_bytes(CONTENT)
    monkeypatch.setattr(transport, "open", lambda path, mode: Replaced(path, mode), raising=False)
    if times == 1:
        assert read_file(str(tmp_path / "x")) == CONTENT and left == [-1]
    else:
        with pytest.raises(OSError, match="Stale"):
            read_file(str(tmp_path / "x"))


def test_a_file_that_stays_short_or_is_not_there(url: str) -> None:
    Flaky.faults = [1] * 100
    with pytest.raises(ValueError, match=r"6 tries .*a short read: 9999 of 10000 bytes"):
        read_file(url)
    Flaky.faults = []
    for read in (read_file, open_file, lambda u: read_range(u, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("flaky://store/none")
    assert read_heads("flaky://store", ["none", "x.tar"], 4) == [b"", CONTENT[:4]]


def test_a_name_with_two_colons_is_no_chain(tmp_path: Path) -> None:
    (tmp_path / "a::b").write_bytes(b"12345")
    assert read_file(f"{tmp_path}/a::b") == b"12345"
    MemoryFileSystem().pipe_file("/store/a::b", b"12345")
    assert read_range("flaky://store/a::b", 1, 3) == b"23"


def test_what_is_no_shard_is_read_through_faults_too(url: str, tmp_path: Path) -> None:
    """A distilled set, IDX files, a metadata table, Parquet files and a class list."""
    store = MemoryFileSystem()
    pixels = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
    made = [NewImage(0, k, 0.5, "p", 0, encode_png(np.full((8, 8), k, np.uint8))) for k in range(2)]
    write_images(Folder("memory://store"), "images-0", made)
    table = pa.table({"image": [m.data for m in made], "label": [0, 1]})
    out = io.BytesIO()
    pq.write_table(table, out)
    for name, data in {
        "train-images-idx3-ubyte": bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4]) + pixels.tobytes(),
        "train-labels-idx1-ubyte": bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1]),
        "metadata.csv": b"file_name,label\na.png,cat\n",
        "rows.parquet": out.getvalue(),
    }.items():
        store.pipe_file(f"/store/{name}", data)

    def faulty(read: Callable[[], Any]) -> Any:
        Flaky.faults = [ConnectionResetError("reset"), 1, None] * 4
        found = read()
        assert len(Flaky.faults) < 12
        return found

    images = faulty(lambda: list(read_images(["flaky://store/images-0.tar"])))
    assert [i.data for i in images] == [m.data for m in made]
    assert faulty(lambda: len(Idx("flaky://store", None).survey().train.names)) == 2
    assert faulty(lambda: metadata._rows("flaky://store/metadata.csv")) == [{"file_name": "a.png", "label": "cat"}]
    assert faulty(lambda: list(table_columns.read_images("flaky://store/rows.parquet", "image"))) == [
        m.data for m in made
    ]
    assert faulty(lambda: list(folders.read_files("flaky://store", ["metadata.csv"])))[0].data.startswith(b"file_name")


def png(value: int) -> bytes:
    return encode_png(np.full((8, 8), value, np.uint8))


@pytest.fixture
def shard(url: str) -> bytes:
    """30 samples under `url`."""
    data = write_tar([m for i in range(30) for m in ((f"s{i:02d}.png", png(i)), (f"s{i:02d}.cls", b"0"))])
    MemoryFileSystem().pipe_file("/store/x.tar", data)
    return data


def test_all_samples_come_once_and_in_order_through_faults(url: str, shard: bytes) -> None:
    before = index_shard(url, 1)
    Flaky.faults = [f for i in range(40) for f in ((FAULTS * 7)[i], None)]
    bad: list[Any] = []
    samples = list(read_samples(url, 1, bad.append))
    assert [s.key for s in samples] == [f"s{i:02d}" for i in range(30)] and not bad
    assert all((np.asarray(s.image) == i).all() for i, s in enumerate(samples))
    Flaky.faults = [f for i in range(40) for f in ((FAULTS * 7)[i], None)]
    assert index_shard(url, 1) == before


@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_store_that_keeps_failing_quarantines_nothing(url: str, shard: bytes, before: int) -> None:
    """Short reads of an object that is longer: no sample of it is bad, and no tar is cut."""
    Flaky.faults = [None] * before + [400] * 100
    bad: list[Any] = []
    with pytest.raises(ValueError, match=r"cannot read flaky://store/x.tar: 6 tries .*a short read: 600 of the 1000"):
        list(read_samples(url, 1, bad.append))
    assert not bad
    Flaky.faults = [None] * before + [400] * 100
    with pytest.raises(ValueError, match="a short read"):
        index_shard(url, 1)


def test_an_object_that_is_cut_is_a_cut_tar(url: str, shard: bytes) -> None:
    MemoryFileSystem().pipe_file("/store/x.tar", shard[: 10 * 2048 + 700])
    bad: list[Any] = []
    assert len(list(read_samples(url, 1, bad.append))) == 10
    assert [b.name for b in bad] == ["s10", ""] and all("broken tar" in b.reason for b in bad)


def test_listing_and_class_lists_are_tried_again_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MemoryFileSystem().pipe_file("/store/classes.json", b'["a", "b"]')
    Flaky.faults = [TimeoutError(), TimeoutError()]
    assert [c.name for c in read_classes("flaky://store/classes.json")] == ["a", "b"]
    failures = [TimeoutError(), ConnectionResetError()]
    isdir = Flaky.isdir

    def unsteady(self: Flaky, path: str) -> bool:
        if failures:
            raise failures.pop()
        return isdir(self, path)

    monkeypatch.setattr(Flaky, "isdir", unsteady)
    assert len(list_shards("flaky://store")) == 1 and not failures
    failures += [PermissionError("denied")]
    with pytest.raises(ValueError, match=r"dataset.path=flaky://store: cannot be listed: PermissionError: denied"):
        list_shards("flaky://store")


def test_a_local_tar_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(write_tar([("a.png", png(1)), ("a.cls", b"0")]))
    with open_shard(str(path)) as f, tarfile.open(fileobj=f) as tar:
        assert tar.getnames() == ["a.png", "a.cls"]
    with open_shard(f"file://{path}") as f:
        assert f.read() == path.read_bytes()
