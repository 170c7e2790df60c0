"""Shards and run directories in stores that speak S3's and Google's language.

Real servers on loopback, over a wire that is cut and that answers for a server that is overloaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.wire import Wire

from ddoq_ray.data.samples import encode_png, list_shards, read_samples
from ddoq_ray.data.shard_index import index_shard
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage import transport
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder

BUCKET = "pictures"
BLOCK = 32 << 10  # of bytes: a shard of the test is several requests
KEYS = [[f"s{s}-{i:03d}" for i in range(100)] for s in range(3)]  # of each shard
SLOW_DOWN = {  # what each store says when it is busy
    "s3": b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>",
    "gs": b'{"error": {"code": 503, "message": "We encountered an internal error. Please try again."}}',
}


@dataclasses.dataclass
class Store:
    """A store as a user has it: `environment` names it, `url` is the folder of the shards."""

    scheme: str
    environment: dict[str, str]
    wire: Wire

    @property
    def url(self) -> str:
        return f"{self.scheme}://{BUCKET}/train"

    def elsewhere(self) -> Any:
        """The store as another process sees it: a file system that remembers nothing."""
        return fsspec.filesystem(self.scheme, skip_instance_cache=True)


def environment_of(scheme: str, port: int) -> dict[str, str]:
    """What names the store on a port of this machine."""
    endpoint = f"http://127.0.0.1:{port}"
    if scheme == "s3":
        return {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    return {"STORAGE_EMULATOR_HOST": endpoint, "FSSPEC_GS_TOKEN": "anon"}


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module", params=["s3", "gs"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """The scheme and the port of a store with three shards of 100 samples."""
    if request.param == "s3":
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server: Any = ThreadedMotoServer("127.0.0.1", port=0)
        server.start()
        port = server.get_host_and_port()[1]
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "key", "secret": "secret"}
    else:
        from gcp_storage_emulator.server import create_server
        from gcsfs.core import GCSFileSystem

        # What a process gets that begins with STORAGE_EMULATOR_HOST; this one may have imported gcsfs without it.
        fsspec.register_implementation("gs", GCSFileSystem, clobber=True)
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # else a page for each fault
        server = create_server("127.0.0.1", 0, in_memory=True)
        server.start()
        listener = server._api._httpd  # which tells its port nowhere else
        listener.handle_error = lambda *_: None  # else a traceback for each connection that is cut
        port = listener.server_address[1]
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon"}
    fs = fsspec.filesystem(request.param, **options)
    fs.mkdir(BUCKET)
    rng = np.random.default_rng(0)
    for s, keys in enumerate(KEYS):
        members = [m for key in keys for m in ((f"{key}.png", encode_png(picture(rng))), (f"{key}.cls", b"%d" % s))]
        fs.pipe_file(f"{BUCKET}/train/shard-{s:03d}.tar", write_tar(members))
    fs.pipe_file(f"{BUCKET}/train/classes.json", json.dumps(["a", "b", "c"]).encode())
    yield request.param, port
    server.stop()


@pytest.fixture
def store(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store behind a wire, named as a user names his own: by the environment."""
    scheme, port = server
    wire = Wire(port, SLOW_DOWN[scheme])
    environment = environment_of(scheme, wire.port)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.get_filesystem_class(scheme)
    if scheme == "s3":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the libraries' own tries would hide ours
        monkeypatch.setattr(fs, "retries", 1)
    else:
        monkeypatch.setattr(fs, "_request", fs._request.__wrapped__)  # the same, where gcsfs tries again
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # fsspec reads its variables once
    monkeypatch.setattr(transport, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(transport, "WAITS", (0.01,) * 5)
    fs.clear_instance_cache()
    yield Store(scheme, environment, wire)
    fs.clear_instance_cache()
    wire.close()


def read(url: str) -> tuple[list[str], list[int], list[Any], list[bytes]]:
    bad: list[Any] = []
    samples = list(read_samples(url, 3, bad.append))
    return [s.key for s in samples], [s.class_id for s in samples], bad, [s.image.tobytes() for s in samples]


@pytest.mark.parametrize(
    "pattern", ["", "/*.tar", "/shard-{000..002}.tar", "/shard-00[0-2].tar", "/{shard-000,*-00[12]}.tar"]
)
def test_shards_are_found_by_folder_glob_and_braces(store: Store, pattern: str) -> None:
    assert list_shards(store.url + pattern) == [f"{store.url}/shard-{s:03d}.tar" for s in range(3)]


def test_what_is_not_there_is_named(store: Store) -> None:
    scheme = store.scheme
    with pytest.raises(ValueError, match=r"dataset.path=.*shard-003.tar does not exist"):
        list_shards(f"{store.url}/shard-{{002..003}}.tar")
    for place in ("nobodys", "nobodys/x", "nobodys/x.tar", f"{BUCKET}/x"):
        with pytest.raises(ValueError, match=rf"dataset.path={scheme}://{place}: {place} does not exist"):
            list_shards(f"{scheme}://{place}")
    with pytest.raises(ValueError, match=rf"dataset.path={scheme}://nobodys/\*.tar: (no shard|.*does not exist)"):
        list_shards(f"{scheme}://nobodys/*.tar")
    with pytest.raises(ValueError, match=rf"cannot read {store.url}/shard-009.tar: FileNotFoundError"):
        read(f"{store.url}/shard-009.tar")


def test_shards_that_come_later_are_found(store: Store) -> None:
    """By the same process, which has listed the folder before."""
    place = f"{store.scheme}://{BUCKET}/later"
    for s in range(3):
        store.elsewhere().pipe_file(f"{place}/{s}.tar", b"")
        assert len(list_shards(place)) == len(list_shards(f"{place}/*.tar")) == s + 1
    fsspec.filesystem(store.scheme).rm(place, recursive=True)


def test_a_folder_is_listed_over_a_bad_wire(store: Store) -> None:
    """No fault makes a folder pass for a shard, or hides one."""
    expected = list_shards(store.url)
    for faults in ([-1] * 2, [0] * 4, [100, -1, 0], [None, -1, None, 50], [None, None, -1, 0, 60]):
        store.wire.faults, store.wire.seen = list(faults), 0
        assert list_shards(store.url) == expected
        assert store.wire.seen


def test_all_samples_in_order(store: Store) -> None:
    rng = np.random.default_rng(0)
    for s, url in enumerate(list_shards(store.url)):
        keys, class_ids, bad, pixels = read(url)
        assert (keys, set(class_ids), bad) == (KEYS[s], {s}, [])
        assert pixels == [picture(rng).tobytes() for _ in keys]
        assert index_shard(url, 3).images == {s: 100}


def test_a_wire_that_is_cut_and_a_store_that_is_busy(store: Store) -> None:
    """Up to five faults in a row, some in an answer's head, most in its body, so in the middle of a picture."""
    wire, url = store.wire, f"{store.url}/shard-001.tar"
    clean = read(url)
    fsspec.filesystem(store.scheme).clear_instance_cache()
    wire.faults = [None] * 4  # the size, for which a store may be asked more than once
    wire.faults += [20_000, 5_000, 300, -1, -1, None, -1, 1_000, 30_000, None, 25_000, -1, 100, -1]
    assert read(url) == clean
    assert clean[0] == KEYS[1] and clean[2] == []
    assert wire.seen == 12 and not wire.faults


def test_a_store_that_stays_away_fails_the_shard_by_name(store: Store) -> None:
    url = f"{store.url}/shard-001.tar"
    store.wire.faults = [20_000] * 50
    bad: list[Any] = []
    with pytest.raises(ValueError, match=rf"cannot read {url}: 6 tries .* run again"):
        list(read_samples(url, 3, bad.append))
    assert bad == []


def test_a_store_that_stays_away_fails_a_file_by_name(store: Store) -> None:
    folder = Folder(f"{store.scheme}://{BUCKET}/away")
    store.wire.faults = [-1] * 50
    with pytest.raises(ValueError, match=rf"cannot write {folder.uri}/x: 6 tries .*what is done stays"):
        folder.publish("x", b"1")
    store.wire.faults.clear()
    assert not folder.exists("x")


def test_a_busy_store_is_asked_again_to_write_and_to_remove(store: Store) -> None:
    """Thousands of workers that publish at once are told to slow down (503): nothing is lost, and the run goes on."""
    folder = Folder(f"{store.scheme}://{BUCKET}/busy")
    large = np.random.default_rng(1).bytes(6 << 20)
    for name, data in (("a", b"1"), ("b", large)):
        store.wire.faults = [-1] * 3
        folder.publish(name, data)
        assert store.wire.seen and folder.read(name) == data
    for name in ("a", ""):
        store.wire.faults, store.wire.seen = [-1] * 3, 0
        folder.remove(name)
        assert store.wire.seen and not folder.exists(name)


def test_a_run_directory_in_the_store(store: Store) -> None:
    folder = Folder(f"{store.scheme}://{BUCKET}/run")
    assert not folder.exists() and folder.names("*") == [] and folder.names("b/*") == []
    folder.check_writable()
    large = np.random.default_rng(0).bytes(6 << 20)  # in parts, for the libraries
    for name, data in (("b/x.bin", b"1"), ("b/y.bin", b""), ("b/x.bin", b"22"), ("b/large.bin", large)):
        folder.publish(name, data)
        assert folder.read(name) == data
    folder.publish_json("a.json", {"k": [1]})
    assert folder.read_json("a.json") == {"k": [1]}
    assert folder.names("*.json") == ["a.json"] and folder.names("b/*.bin") == ["b/large.bin", "b/x.bin", "b/y.bin"]
    assert folder.names("*/*") == folder.names("b/*") and (folder / "b").names("?.bin") == ["x.bin", "y.bin"]
    assert folder.digest("b/large.bin") == (hashlib.sha256(large).hexdigest(), len(large))
    with folder.reading("b/x.bin") as f:
        assert f.read(1) == f.read() == b"2"
    with pytest.raises(ZeroDivisionError), folder.writing("b/z.bin") as f:
        f.write(b"half")
        1 / 0  # noqa: B018
    assert not folder.exists("b/z.bin") and folder.exists("b/x.bin") and folder.exists("b")
    with pytest.raises(FileNotFoundError):
        folder.read("b/z.bin")
    folder.remove("b/x.bin")
    folder.remove("never/there")
    assert folder.names("b/*") == ["b/large.bin", "b/y.bin"]
    folder.remove()
    assert not folder.exists("a.json") and not folder.exists() and folder.names("*") == []
    with pytest.raises(ValueError, match=rf"cannot write {store.scheme}://nobodys/run: .*choose another run_dir"):
        Folder(f"{store.scheme}://nobodys/run").check_writable()


def test_a_stage_begins_finishes_and_is_made_anew_in_the_store(store: Store) -> None:
    artifact = Artifact(Folder(f"{store.scheme}://{BUCKET}/stages") / "encode", "encode")
    assert (artifact.manifest(), artifact.begin({"a": 1}), artifact.begin({"a": 1})) == (None, "new", "open")
    artifact.folder.publish("shard-0/chunk-0", b"old")
    manifest = artifact.finish({"a": 1}, items=3)
    assert artifact.begin({"a": 1}) == "done" and artifact.require() == manifest
    with pytest.raises(ValueError, match=f"{store.scheme}://{BUCKET}/stages/encode holds the encode stage of another"):
        artifact.begin({"a": 2})
    assert artifact.begin({"a": 2}, overwrite=True) == "new"
    assert artifact.folder.names("*") == ["started.json"]
    artifact.folder.remove()


def test_a_run_directory_shows_what_other_processes_publish(store: Store) -> None:
    """The driver lists what its workers publish, again and again; the libraries remember listings."""
    folder, workers = Folder(f"{store.scheme}://{BUCKET}/shared"), store.elsewhere()
    folder.publish("started.json", b"{}")
    for part in range(3):
        for pattern in ("*", "*.json", "part-*.json", "shard-*/done.json"):
            folder.names(pattern)
        name = f"part-{part}.json"
        assert not folder.exists(name)
        for data in (b"1", b"and longer"):
            workers.pipe_file(folder.path(name), data)
            workers.pipe_file(folder.path(f"shard-{part}/done.json"), data)
            assert folder.exists(name) and folder.read(name) == data
            with folder.reading(name) as f:
                assert f.read() == data
        assert folder.names("part-*.json") == [f"part-{i}.json" for i in range(part + 1)]
        assert folder.names("shard-*/done.json") == [f"shard-{i}/done.json" for i in range(part + 1)]
    folder.names("*")
    workers.pipe_file(folder.path("late.json"), b"1")
    folder.remove()
    assert store.elsewhere().find(folder.uri) == []


@pytest.mark.processes
def test_the_environment_is_all_that_a_process_needs(store: Store) -> None:
    """A process that begins with the store's name reads and writes there, and waits for nobody else.

    An actor may know run directories only, so `ddoq_ray.storage.folder` comes first.
    """
    program = """if True:
        import sys
        url, run = sys.argv[1:]
        from ddoq_ray.storage.folder import Folder
        Folder(run).publish("x", b"1")
        print(Folder(run).names("*"), Folder(run).read("x"))
        from ddoq_ray.data.samples import list_shards, read_samples
        print(sum(1 for shard in list_shards(url) for _ in read_samples(shard, 3, print)))
    """
    run = f"{store.scheme}://{BUCKET}/process"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GCSFS")} | store.environment
    command = [sys.executable, "-c", program, store.url, run]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert found.stdout.splitlines() == ["['x'] b'1'", "300"], found.stderr
    Folder(run).remove()


@pytest.mark.slow  # a Ray of its own, whose workers have the environment
def test_encode_from_the_store(store: Store, tmp_path: Path) -> None:
    """The same latents from the store, over a bad wire, as from a disk; and on a run directory in the store."""
    import ray

    from ddoq_ray.config.compose import load_config
    from ddoq_ray.execution.networks import Networks
    from ddoq_ray.execution.run import Run
    from ddoq_ray.execution.workers import Events
    from ddoq_ray.models.priors.load import load_prior
    from ddoq_ray.stages.encode import step as encode
    from ddoq_ray.stages.prepare import step as prepare

    fsspec.filesystem(store.scheme).get(f"{BUCKET}/train", str(tmp_path / "train"), recursive=True)
    prior = load_prior(load_config().prior.path)
    facts = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    digests = {}
    try:
        for name, path, run, faults in (
            ("disk", str(tmp_path / "train"), str(tmp_path / "disk"), []),
            ("store", f"{store.url}/*.tar", str(tmp_path / "store"), [20_000, 30_000, -1] * 4),
            ("all there", f"{store.url}/*.tar", f"{store.scheme}://{BUCKET}/runs/1", []),
        ):
            store.wire.faults = list(faults)
            config = load_config(
                ["experiment=digits", "dataset=webdataset", f"dataset.path={path}", "stages=[prepare,encode]"]
            )
            config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, chunk_samples=16))
            folder = Folder(run)
            events = Events(folder)
            data = prepare.run(config, folder, events)
            manifest = encode.run(Run(config, folder, data, facts, events), lambda shard: None)
            assert (manifest["items"], manifest["refused"], manifest["refused_by_reason"]) == (300, 0, {})
            digests[name] = manifest["digest"]
    finally:
        ray.shutdown()
    assert digests["disk"] == digests["store"] == digests["all there"]
    assert store.wire.seen
