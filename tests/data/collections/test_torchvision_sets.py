"""torchvision's own classes on small sets in their own formats: from disk, from a server, and from a bad server."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.torchvision_archives import MAKERS, Archives, Server, imagenet, imagenette, md5, serving

from ddoq_ray.data.collections import torchvision_sets
from ddoq_ray.data.collections.listing import NO_LABEL, Picture
from ddoq_ray.data.collections.torchvision_sets import ARRAYS, TorchvisionSet
from ddoq_ray.data.pictures import encode_png
from ddoq_ray.storage.folder import Folder

SCRATCH = Folder("nowhere")
NOBODY = "http://127.0.0.1:9/"  # nobody listens there, so that it is the same with and without a network


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as server:
        yield server


def serve(made: Archives, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made.patch(monkeypatch, server.address)
    server.files = {os.path.basename(path): data for path, data in made.files.items()}


def put(files: dict[str, bytes], root: Path) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def check(made: Archives, root: Path) -> None:
    """Classes, labels, and every picture, as they were put into the archives."""
    source = TorchvisionSet(made.name, str(root), None)
    survey = source.survey()
    assert [c.name for c in survey.classes] == made.classes
    assert survey.val is not None
    for split, listing in (("train", survey.train), ("val", survey.val)):
        samples = made.samples[split]
        assert listing.names == sorted(samples) and listing.refused == []
        assert listing.class_ids.tolist() == [samples[name][0] for name in listing.names]
        pictures = list(source.read(split, listing.names[::-1], SCRATCH))[::-1]
        for name, size, picture in zip(listing.names, listing.sizes, pictures, strict=True):
            content = samples[name][1]
            if made.name in ARRAYS:
                assert np.array_equal(pixels(picture), content) and size == content.size
            else:
                assert picture == Picture(content, name.rpartition(".")[2]) and size == len(content)


def left(root: Path) -> list[str]:
    """Everything below a folder, but for the empty file that keeps two processes apart."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.name.endswith(".lock"))


def pixels(picture: object) -> np.ndarray:
    assert isinstance(picture, Picture) and picture.extension == "png"
    return np.asarray(Image.open(io.BytesIO(picture.data)))


def test_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    images = np.arange(3 * 16, dtype=np.uint8).reshape(3, 4, 4)
    for part, n in (("train", 3), ("t10k", 2)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 4, 4) + images[:n].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + bytes([9, 0, 3][:n]))
    source = TorchvisionSet("FashionMNIST", str(tmp_path), None)
    survey = source.survey()
    assert (len(survey.classes), survey.classes[9].name) == (10, "Ankle boot")
    assert (survey.train.class_ids.tolist(), survey.val.class_ids.tolist()) == ([9, 0, 3], [9, 0])  # type: ignore[union-attr]
    assert np.array_equal(np.stack([pixels(p) for p in source.read("train", survey.train.names, SCRATCH)]), images)


def test_imagenette_keeps_the_files_bytes(tmp_path: Path) -> None:
    from torchvision import datasets

    for split in ("train", "val"):
        for i, wnid in enumerate(datasets.Imagenette._WNID_TO_CLASS):
            folder = tmp_path / "imagenette2-160" / split / wnid
            folder.mkdir(parents=True)
            out = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(out, "JPEG")
            (folder / f"{wnid}_{split}.JPEG").write_bytes(out.getvalue())
    source = TorchvisionSet("Imagenette", str(tmp_path), None)
    survey = source.survey()
    assert [(c.name, c.prompt) for c in survey.classes][:2] == [
        ("n01440764", "tench"), ("n02102040", "English springer"),
    ]  # fmt: skip
    assert survey.train.class_ids.tolist() == list(range(10))
    name = survey.train.names[3]
    assert name == "imagenette2-160/train/n03000684/n03000684_train.JPEG"
    assert list(source.read("train", [name], SCRATCH)) == [Picture((tmp_path / name).read_bytes(), "JPEG")]


def test_imagenet_takes_the_words_of_its_own_metadata(tmp_path: Path) -> None:
    import torch

    from ddoq_ray.data.collections.classes import _positions

    wnids = {w: ("words of", w) for w in ("n01440764", "n02102040")}
    torch.save((wnids, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for wnid in wnids:
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "a.JPEG").write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    survey = TorchvisionSet("ImageNet", str(tmp_path), None).survey()
    assert [(c.name, c.prompt) for c in survey.classes] == [(w, "words of") for w in sorted(wnids)]
    assert {(c.teacher_index, c.prior_label) for c in survey.classes} == {(None, None)}  # two are not the 1,000
    assert set(wnids) <= set(_positions())
    assert survey.train.names == [f"train/{w}/a.JPEG" for w in sorted(wnids)]


# ImageNet's archives; the others', by hand and from a server.


def test_imagenets_archives_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import imagenet as module

    made, sums = imagenet()
    put(made.files, tmp_path)
    monkeypatch.setattr(module, "ARCHIVE_META", sums)
    check(made, tmp_path)
    for name in made.files:
        (tmp_path / name).unlink()
    check(made, tmp_path)


@pytest.mark.parametrize(
    ("split", "rest"), [("train", "n02102040.tar"), ("val", "ILSVRC2012_val_00000003.JPEG"), ("val", "n02102040")]
)
def test_imagenet_unpacked_in_half_is_not_taken_for_whole(
    split: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, torchvision leaves tars in train/, pictures in val/; a class that is gone shifts labels."""
    from torchvision.datasets import imagenet as module

    made, sums = imagenet()
    put(made.files, tmp_path)
    monkeypatch.setattr(module, "ARCHIVE_META", sums)
    check(made, tmp_path)
    if rest == "n02102040":
        shutil.rmtree(tmp_path / split / rest)
    else:
        (tmp_path / split / rest).write_bytes(b"unopened")
    with pytest.raises(ValueError, match=rf"(?i)ImageNet: {tmp_path}.*{rest}.*remove"):
        TorchvisionSet("ImageNet", str(tmp_path), None).survey()
    for half in ("train", "val"):
        shutil.rmtree(tmp_path / half)
    check(made, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_archives_put_there_by_hand(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MAKERS[name]()
    made.patch(monkeypatch, NOBODY)
    put(made.files, tmp_path)
    check(made, tmp_path)
    for path, data in made.files.items():
        assert (tmp_path / path).read_bytes() == data and not (tmp_path / path).is_symlink()


@pytest.mark.parametrize("name", MAKERS)
def test_a_download(name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MAKERS[name]()
    serve(made, server, monkeypatch)
    root = tmp_path / "not" / "there"
    with pytest.raises(ValueError, match=rf"{name}: not in dataset.path={root}.*that every node sees"):
        list(TorchvisionSet(name, str(root), None).read("train", list(made.samples["train"]), SCRATCH))
    assert server.asked == []  # only the survey downloads: reading is done by many processes at once
    check(made, root)
    assert sorted(set(server.asked)) == sorted(server.files)
    whole = left(root)
    server.asked.clear()
    check(made, root)
    assert server.asked == [] and left(root) == whole
    assert not [path for path in whole if path.startswith(".")]


FAULTS = ("absent", "cut", "chunked", "broken", "wrong", "stalled")


# Of one set every fault, of the others one that needs no time-out and the one that a checksum alone tells.
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        pytest.param(n, f, marks=[] if n == "Flowers102" or f in ("cut", "wrong") else pytest.mark.slow)
        for n in MAKERS for f in FAULTS
    ],
)  # fmt: skip
def test_a_bad_server_is_an_error_and_leaves_nothing(
    name: str, fault: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short only where it is waited for: a busy machine answers late too.
    monkeypatch.setattr(torchvision_sets, "STALL_S", 1.0 if fault == "stalled" else 20.0)
    made = MAKERS[name]()
    serve(made, server, monkeypatch)
    last = list(server.files)[-1]  # of four files, three are there by then
    server.faults = {last: fault}
    with pytest.raises(ValueError) as caught:
        TorchvisionSet(name, str(tmp_path), None).survey()
    told = str(caught.value)
    start = f"dataset.torchvision={name}: not in dataset.path={tmp_path} (Dataset not found"
    assert told.startswith(start) and "cannot be downloaded (" in told
    path, data = list(made.files.items())[-1]
    gave = {"absent": "nothing", "cut": f"{len(data) // 2:,} bytes", "wrong": f"{len(data):,} bytes"}.get(fault, "")
    assert f"{server.address}{last} gave {gave}" in told, told
    assert f"expected MD5 {md5(data)}" in told and path in told.partition("or put ")[2], told
    assert left(tmp_path) == []
    server.faults = {}
    check(made, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_half_an_archive_that_somebody_left(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchvision's own downloads leave it: named in the error where there is no network, else downloaded anew."""
    made = MAKERS[name]()
    made.patch(monkeypatch, NOBODY)
    put({path: data[: len(data) // 2] for path, data in made.files.items()}, tmp_path)
    before = left(tmp_path)
    path, data = next(iter(made.files.items()))
    there = f"{path} in dataset.path has {len(data) // 2:,} bytes of MD5 "
    with pytest.raises(ValueError, match=rf"{name}: not in dataset.path={tmp_path}.*{there}"):
        TorchvisionSet(name, str(tmp_path), None).survey()
    assert left(tmp_path) == before
    serve(made, server, monkeypatch)
    check(made, tmp_path)


@pytest.mark.parametrize("half", [0, 3, 100])
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"), ("CIFAR10", "cifar-10-batches-py/batches.meta"),
        ("CIFAR100", "cifar-100-python/meta"), ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("FashionMNIST", "FashionMNIST/raw/t10k-labels-idx1-ubyte"), ("Flowers102", "flowers-102/setid.mat"),
    ],
)  # fmt: skip
def test_half_a_file_of_a_set_is_downloaded_anew(
    name: str, path: str, half: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MAKERS[name]()
    serve(made, server, monkeypatch)
    check(made, tmp_path)
    whole = (tmp_path / path).read_bytes()
    cut = whole[:half] if half < len(whole) else whole[:-1]
    (tmp_path / path).write_bytes(cut)
    (tmp_path / path).with_name("mine.txt").write_text("kept")
    check(made, tmp_path)
    assert (tmp_path / path).read_bytes() == whole
    assert (tmp_path / path).with_name("mine.txt").read_text() == "kept"


# Cut short in the middle of unpacking.

KILLED = """
import json, resource, signal, sys
from torchvision import datasets
from ddoq_ray.data.collections.torchvision_sets import TorchvisionSet
datasets.Imagenette._ARCHIVES = json.loads(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # killed by the first file of more bytes than:
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
TorchvisionSet("Imagenette", sys.argv[2], None).survey()
"""


@pytest.mark.processes
def test_a_process_killed_while_it_unpacks(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of both splits has a picture by then: the half folder would pass for the set."""
    made = imagenette(last=b"\xff\xd8" + bytes(1_000_000))
    serve(made, server, monkeypatch)
    archives = json.dumps(made.attributes(server.address)["_ARCHIVES"])
    killed = subprocess.run([sys.executable, "-c", KILLED, archives, str(tmp_path)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert len([path for path in left(tmp_path) if path.endswith(".JPEG")]) == 41  # unpacked, somewhere
    check(made, tmp_path)
    assert not [path for path in left(tmp_path) if path.startswith(".")]


def test_a_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = imagenette(last=b"\xff\xd8" + bytes(1_000_000))
    serve(made, server, monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"Imagenette: .*cannot be downloaded \(.*File too large"):
            TorchvisionSet("Imagenette", str(tmp_path), None).survey()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(tmp_path) == []
    check(made, tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_several_runs_at_once_download_once(
    name: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MAKERS[name]()
    serve(made, server, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(check, made, tmp_path) for _ in range(4)]:
            done.result()
    assert sorted(server.asked) == sorted(2 * list(server.files))


# What is refused.


def test_imagenettes_sizes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size whose folder or archive is there; the full one where none is."""
    small = imagenette("160px")
    small.patch(monkeypatch, NOBODY)
    put(small.files, tmp_path)
    check(small, tmp_path)
    (tmp_path / "imagenette2-320").mkdir()
    with pytest.raises(ValueError, match=r"imagenette2-320 and imagenette2-160.*dataset=imagefolder"):
        TorchvisionSet("Imagenette", str(tmp_path), None).survey()
    (tmp_path / "imagenette2-320").rmdir()
    shutil.rmtree(tmp_path / "imagenette2-160" / "val")
    with pytest.raises(ValueError, match=r"imagenette2-160 is not whole \(.*val.*\); move it away"):
        TorchvisionSet("Imagenette", str(tmp_path), None).survey()


def test_what_is_neither_there_nor_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ImageNet: not in dataset.path.*cannot be downloaded.*dataset=imagefolder"):
        TorchvisionSet("ImageNet", str(tmp_path), None).survey()
    made = imagenette()
    made.patch(monkeypatch, NOBODY)
    with pytest.raises(ValueError, match=r"Imagenette: not in dataset.path=.*cannot be downloaded .*put imagenette2"):
        TorchvisionSet("Imagenette", str(tmp_path), None).survey()
    assert left(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Imagenette: .*cannot be downloaded \(.*Not a directory"):
        TorchvisionSet("Imagenette", str(tmp_path / "file" / "below"), None).survey()
    with pytest.raises(ValueError, match=r"dataset.path=s3://pictures/x: .*local folder"):
        TorchvisionSet("CIFAR10", "s3://pictures/x", None)


@pytest.mark.parametrize("name", ["CIFAR10", "Flowers102"])
def test_a_label_of_minus_one_is_none(name: str, tmp_path: Path) -> None:
    labels = [2, -1, 0, 1]
    files = [str(tmp_path / f"{i}.jpg") for i in range(4)]
    there = SimpleNamespace(data=np.zeros((4, 8, 8, 3), np.uint8), targets=labels, _image_files=files, _labels=labels)
    listing = TorchvisionSet(name, str(tmp_path), None)._listing(there, [0, 1, 2])
    assert listing.class_ids.tolist() == [2, 0, 1] and len(listing.names) == 3
    assert [(r.name, r.reason) for r in listing.refused] == [(f"{1:09d}" if name == "CIFAR10" else "1.jpg", NO_LABEL)]
