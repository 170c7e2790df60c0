"""The run directory: files whole or not at all, and the rule that decides what is reused."""

from __future__ import annotations

import errno
import json
import pickle
import re
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from ddoq_ray.storage.artifact import Artifact, NotAsWritten, canonical, checked, differences, digest_of, with_check
from ddoq_ray.storage.folder import Folder, write_error


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def test_publish_read_names_remove(folder: Folder) -> None:
    assert not folder.exists() and folder.names("*") == []
    folder.publish("b/x.bin", b"1")
    folder.publish("b/y.bin", b"")
    folder.publish("b/x.bin", b"22")
    folder.publish_json("a.json", {"k": [1]})
    assert folder.read("b/x.bin") == b"22" and folder.read("b/y.bin") == b""
    assert folder.read_json("a.json") == {"k": [1]}
    assert folder.names("b/*.bin") == ["b/x.bin", "b/y.bin"]
    assert (folder / "b").names("*.bin") == ["x.bin", "y.bin"]
    assert (folder / "").uri == folder.uri
    with pytest.raises(FileNotFoundError):
        folder.read("b/z.bin")
    folder.remove("b/x.bin")
    folder.remove("never/there")
    assert folder.names("b/*") == ["b/y.bin"]
    folder.remove()
    assert not folder.exists("a.json")
    folder.check_writable()
    assert folder.names("*") == []


def test_what_goes_while_it_is_removed_is_gone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    names = [f"some/{i:03d}.json" for i in range(300)]
    for name in names:
        folder.publish(name, b"{}")
    failed: list[BaseException] = []

    def remove() -> None:
        try:
            for name in names:
                folder.remove(name)
            folder.remove("some")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=remove) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and not folder.exists("some")


def test_writing_piece_by_piece(folder: Folder) -> None:
    folder.publish("b/x", b"old")
    with folder.writing("b/x") as f:
        f.write(b"new ")
        assert folder.read("b/x") == b"old"
        f.write(b"bytes")
    assert folder.read("b/x") == b"new bytes"
    with pytest.raises(ZeroDivisionError), folder.writing("b/y") as f:
        f.write(b"half")
        1 / 0  # noqa: B018
    assert folder.names("b/*") == ["b/x"]


def test_finishing_removes_what_killed_writers_left(tmp_path: Path) -> None:
    """A writer killed between writing and renaming leaves its temporary file: it is no part of the output."""
    folder = Folder(str(tmp_path))
    artifact = Artifact(folder / "latents", "encode")
    artifact.begin({"a": 1})
    folder.publish("latents/shard-0/chunk", b"whole")
    for name in ("latents/shard-0/chunk.12345678.tmp", "latents/started.json.12345678.tmp", "images/x.12345678.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"ha")
    artifact.finish({"a": 1})
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [
        "images/x.12345678.tmp",  # another stage's, which may be at work
        "latents/manifest.json",
        "latents/shard-0/chunk",
        "latents/started.json",
    ]


def test_folders_travel_to_other_processes(folder: Folder) -> None:
    assert pickle.loads(pickle.dumps(folder)).uri == folder.uri


def test_relative_paths_are_fixed_when_the_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("run/")
    monkeypatch.chdir("/")
    folder.publish("x", b"1")
    assert (tmp_path / "run/x").read_bytes() == b"1"


def test_a_reader_sees_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    """One file published over and over: each read gives one of the contents, and never a temporary name."""
    folder = Folder(str(tmp_path))
    contents = [bytes([i]) * 200_000 for i in range(2)]
    folder.publish("x", contents[0])
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            i = 1 - i
            folder.publish("x", contents[i])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {folder.read("x") for _ in range(150)}
        assert folder.names("*") == ["x"]
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_place_that_cannot_be_written_says_so_in_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="a file, not a folder; choose another run_dir") as error:
            Folder(str(place)).check_writable()
        assert f"cannot write {place}:" in str(error.value)
    with pytest.raises(ValueError, match=r"cannot write /proc/ddoq: .*choose another run_dir"):
        Folder("/proc/ddoq").check_writable()
    for number in (errno.EACCES, errno.EROFS):
        message = write_error("/data/run", OSError(number, "Denied"))
        assert "no permission to write /data/run" in message and "choose another run_dir" in message
    assert "No space left" in write_error("/data", OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.processes
@pytest.mark.parametrize("call", ["folder.check_writable()", "Lease(folder).acquire()"])
def test_a_place_that_takes_names_but_no_bytes(tmp_path: Path, call: str) -> None:
    """A full disk, as a limit on the size of files shows it: nothing is left behind, and no traceback."""
    code = "; ".join((
        "import resource", "from ddoq_ray.storage.folder import Folder", "from ddoq_ray.execution.lease import Lease",
        f"folder = Folder({str(tmp_path)!r})", "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))", call,
    ))  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"\nValueError: cannot write .*choose another run_dir\n$", ended.stderr), ended.stderr
    assert not list(tmp_path.iterdir())


def test_canonical_text_and_digest() -> None:
    assert canonical({"b": 1, "a": (1, 2)}) == '{"a":[1,2],"b":1}'
    assert digest_of({"b": 1, "a": 2}) == digest_of({"a": 2, "b": 1})
    assert digest_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_differences_name_each_leaf_with_both_values() -> None:
    old = {"q": {"name": "clvq", "batch": 1}, "ipc": 10, "gone": 1}
    new = {"q": {"name": "gram", "batch": 1}, "ipc": 10, "come": "x"}
    assert differences(old, new) == [
        'come: null there, "x" now', "gone: 1 there, null now", 'q.name: "clvq" there, "gram" now'
    ]  # fmt: skip
    assert differences({"a": [1]}, {"a": (1,)}) == []


def test_life_of_an_artifact(folder: Folder) -> None:
    artifact = Artifact(folder / "codebook", "quantize")
    facts = {"ipc": 10, "quantizer": {"name": "clvq"}}
    assert artifact.manifest() is None
    assert artifact.check(facts) == "new" and not folder.exists("codebook/started.json")
    with pytest.raises(ValueError, match=r"is not finished: run the quantize stage first \(ddoq-ray quantize"):
        artifact.require()

    assert artifact.begin(facts) == "new"
    assert artifact.begin(facts) == "open" == artifact.check(facts)
    assert artifact.manifest() is None

    made = artifact.finish(facts, items=3)
    assert made["items"] == 3 and made["identity_digest"] == digest_of(facts)
    assert artifact.begin(facts) == "done" == artifact.check(facts)
    assert artifact.check({"ipc": 10}) == "done"  # as far as the keys asked for go
    assert artifact.require() == artifact.manifest() == json.loads(json.dumps(made))


@pytest.mark.parametrize("finished", [False, True])
def test_another_identity_is_refused_by_both_values(folder: Folder, finished: bool) -> None:
    artifact = Artifact(folder / "codebook", "quantize")
    facts = {"ipc": 10, "quantizer": {"name": "clvq"}}
    artifact.begin(facts)
    artifact.folder.publish("part", b"x")
    if finished:
        artifact.finish(facts)
    other = {"ipc": 50, "quantizer": {"name": "clvq"}}
    for call in (artifact.check, artifact.begin):
        with pytest.raises(ValueError) as error:
            call(other)
        for word in (artifact.folder.uri, "quantize", "ipc: 10 there, 50 now", "overwrite=true", "another run_dir"):
            assert word in str(error.value)
        assert "clvq" not in str(error.value)  # what agrees is not told
    assert artifact.folder.read("part") == b"x"

    assert artifact.begin(other, overwrite=True) == "new"
    assert artifact.folder.names("*") == ["started.json"]
    assert artifact.begin(other) == "open"


def test_overwrite_keeps_what_agrees(folder: Folder) -> None:
    artifact = Artifact(folder, "encode")
    artifact.begin({"a": 1})
    artifact.finish({"a": 1})
    assert artifact.begin({"a": 1}, overwrite=True) == "done"


def test_a_record_knows_each_of_its_bytes() -> None:
    """Whatever bit of a record is turned, it is refused, or says the same."""
    row = {"seconds": 1.25, "shards": [{"name": "images-000000", "bytes": 7}], "identity": {1: None, 10: True, 2: "x"}}
    data = (json.dumps(with_check(row), indent=1) + "\n").encode()
    assert checked(data, strict=True) == json.loads(canonical(row))
    for at in range(len(data)):
        for bit in range(8):
            turned = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            try:
                assert checked(turned, strict=True) == json.loads(canonical(row))
            except NotAsWritten:
                continue
            assert data[at : at + 1].isspace(), "only white space may be another"
    for end in range(len(data) - 2):
        with pytest.raises(NotAsWritten):
            checked(data[:end])
    assert checked(b'{"a": 1}') == {"a": 1}, "records of older versions have no digest"


def test_files_of_an_artifact_are_read_as_they_were_written(folder: Folder) -> None:
    student = Artifact(folder, "train")
    student.begin({"a": 1})
    folder.publish("model.safetensors", b"weights")
    folder.publish("notes.txt", b"of nobody's")
    assert student.finish({"a": 1})["files"] == {"model.safetensors": {"bytes": 7, "sha256": digest_of(b"weights")}}
    assert student.read("model.safetensors") == b"weights" and student.read("notes.txt") == b"of nobody's"
    folder.publish("model.safetensors", b"Weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*ddoq-ray verify RUN repair=true.*train"):
        student.read("model.safetensors")
    student.amend("model.safetensors", seconds=2)
    assert student.read("model.safetensors") == b"Weights" and student.require()["seconds"] == 2
    folder.remove("model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        student.read("model.safetensors")
    folder.publish("manifest.json", folder.read("manifest.json").replace(b"train", b"brain"))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*ddoq-ray train"):
        student.manifest()
