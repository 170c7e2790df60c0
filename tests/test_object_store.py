"""Shards in an S3 store: a real server on loopback, over a wire that is cut and a server that is overloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from ddoq_ray import transport
from ddoq_ray.artifacts import Folder
from ddoq_ray.samples import encode_png, index_shard, list_shards, read_samples, write_tar

BUCKET = "pictures"
BLOCK = 64 << 10  # of bytes: a shard of the test is several requests
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Wire:
    """A TCP proxy in front of the server, which cuts connections and answers that it is overloaded.

    Attributes:
        faults: For each connection to come: how many bytes of answers pass before it is cut; -1: a 503; None: no fault.
        seen: Faults that happened.
    """

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.faults: list[int | None] = []
        self.seen = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                fault = self.faults.pop(0) if self.faults else None
                threading.Thread(target=self._connect, args=(client, fault), daemon=True).start()

    def _connect(self, client: socket.socket, fault: int | None) -> None:
        if fault == -1:
            self.seen += 1
            client.recv(1 << 16)
            head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(SLOW_DOWN)}\r\nConnection: close\r\n\r\n"
            client.sendall(head.encode() + SLOW_DOWN)
            client.close()
            return
        server = socket.create_connection(("127.0.0.1", self.server_port))
        threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
        self._pump(server, client, fault)

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if limit is not None and passed + len(data) > limit:
                    self.seen += 1
                    sink.sendall(data[: limit - passed])
                    break
                sink.sendall(data)
                passed += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread of the other direction
            end.close()

    def close(self) -> None:
        self.listener.close()


URL = f"s3://{BUCKET}/train"
KEYS = [[f"s{s}-{i:03d}" for i in range(100)] for s in range(3)]  # of each shard


def picture(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3-speaking server with three shards of 100 samples."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0)
    moto.start()
    _, port = moto.get_host_and_port()
    names = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    s3 = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **names)
    s3.create_bucket(Bucket=BUCKET)
    rng = np.random.default_rng(0)
    for s, keys in enumerate(KEYS):
        members = [m for key in keys for m in ((f"{key}.png", encode_png(picture(rng))), (f"{key}.cls", b"%d" % s))]
        s3.put_object(Bucket=BUCKET, Key=f"train/shard-{s:03d}.tar", Body=write_tar(members))
    s3.put_object(Bucket=BUCKET, Key="train/classes.json", Body=json.dumps(["a", "b", "c"]).encode())
    yield port
    moto.stop()


@pytest.fixture
def wire(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """The way to the store, which is named as a user names his own: by the environment."""
    wire = Wire(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the libraries' own tries would hide ours
    s3 = type(fsspec.filesystem("s3"))
    monkeypatch.setattr(s3, "retries", 1)
    monkeypatch.setattr(transport, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(transport, "WAITS", (0.01,) * 5)
    s3.clear_instance_cache()
    yield wire
    s3.clear_instance_cache()
    wire.close()


def read(url: str) -> tuple[list[str], list[int], list[Any], list[bytes]]:
    bad: list[Any] = []
    samples = list(read_samples(url, 3, bad.append))
    return [s.key for s in samples], [s.class_id for s in samples], bad, [s.image.tobytes() for s in samples]


@pytest.mark.parametrize(
    "pattern", ["", "/*.tar", "/shard-{000..002}.tar", "/shard-00[0-2].tar", "/{shard-000,*-00[12]}.tar"]
)
def test_shards_are_found_by_folder_glob_and_braces(wire: Wire, pattern: str) -> None:
    assert list_shards(URL + pattern) == [f"{URL}/shard-{s:03d}.tar" for s in range(3)]


def test_what_is_not_there_is_named(wire: Wire) -> None:
    with pytest.raises(ValueError, match=r"dataset.path=.*shard-003.tar does not exist"):
        list_shards(f"{URL}/shard-{{002..003}}.tar")
    with pytest.raises(ValueError, match=r"dataset.path=s3://nobodys/x: .*does not exist"):
        list_shards("s3://nobodys/x")
    with pytest.raises(ValueError, match=r"cannot read s3://pictures/train/shard-009.tar"):
        read(f"{URL}/shard-009.tar")


def test_all_samples_in_order(wire: Wire) -> None:
    rng = np.random.default_rng(0)
    for s, url in enumerate(list_shards(URL)):
        keys, class_ids, bad, pixels = read(url)
        assert (keys, set(class_ids), bad) == (KEYS[s], {s}, [])
        assert pixels == [picture(rng).tobytes() for _ in keys]
        assert index_shard(url, 3).images == {s: 100}


def test_a_wire_that_is_cut_and_a_store_that_is_busy(wire: Wire) -> None:
    """Up to five faults in a row, some in an answer's head, most in its body, so in the middle of a picture."""
    url = f"{URL}/shard-001.tar"
    clean = read(url)
    fsspec.filesystem("s3").clear_instance_cache()
    wire.faults = [None, 20_000, 5_000, 300, -1, -1, None, -1, 1_000, 40_000, None, 60_000, -1, 100, -1]
    assert read(url) == clean
    assert clean[0] == KEYS[1] and clean[2] == []
    assert wire.seen >= 10 and not wire.faults  # of 12: an answer may end before its cut


def test_a_store_that_stays_away_fails_the_shard_by_name(wire: Wire) -> None:
    url = f"{URL}/shard-001.tar"
    wire.faults = [20_000] * 50
    bad: list[Any] = []
    with pytest.raises(ValueError, match=rf"cannot read {url}: 6 tries .* run again"):
        list(read_samples(url, 3, bad.append))
    assert bad == []


@pytest.mark.slow  # a Ray of its own, whose workers have the environment
def test_encode_from_the_store(wire: Wire, tmp_path: Path) -> None:
    """The same latents from the store, over a bad wire, as from a disk."""
    import ray

    from ddoq_ray.config.compose import load_config
    from ddoq_ray.models.prior import load_prior
    from ddoq_ray.runtime import Events
    from ddoq_ray.stages import encode, prepare
    from ddoq_ray.stages.networks import Networks

    fsspec.filesystem("s3").get(f"{BUCKET}/train", str(tmp_path / "train"), recursive=True)
    prior = load_prior(load_config().prior.path)
    facts = Networks(prior.id, tuple(prior.latent_shape), prior.image_size, None, 10, None, None, None, 0, 0, {})
    wire.faults = [30_000, 40_000, -1] * 4
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    digests = {}
    try:
        for name, path in (("disk", str(tmp_path / "train")), ("store", f"{URL}/*.tar")):
            config = load_config(["dataset=webdataset", f"dataset.path={path}", "stages=[prepare,encode]"])
            config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, chunk_samples=16))
            folder = Folder(str(tmp_path / name))
            events = Events(folder)
            data = prepare.run(config, folder, events)
            manifest = encode.run(config, folder, data, events, facts, lambda shard: None)
            assert (manifest["items"], manifest["refused"], manifest["refused_by_reason"]) == (300, 0, {})
            digests[name] = manifest["digest"]
    finally:
        ray.shutdown()
    assert digests["disk"] == digests["store"]
    assert wire.seen
