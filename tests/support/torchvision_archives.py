"""Small archives in the layout of each of torchvision's sets, and a server on loopback that hands them out."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

Samples = dict[str, tuple[int, Any]]


@dataclass
class Archives:
    """What is downloaded of a set, and what must come of it.

    Attributes:
        files: Path below dataset.path, where torchvision keeps the archive -> its bytes.
        classes: Names, in label order.
        samples: Split -> name in the listing -> (class_id, uint8 pixels or the file's bytes).
        attributes: Of an address that ends in "/" -> the torchvision class's attributes that name addresses and sums.
    """

    name: str
    files: dict[str, bytes]
    classes: list[str]
    samples: dict[str, Samples]
    attributes: Callable[[str], dict[str, Any]]

    def patch(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        from torchvision import datasets

        for attribute, value in self.attributes(address).items():
            assert hasattr(getattr(datasets, self.name), attribute), attribute
            monkeypatch.setattr(getattr(datasets, self.name), attribute, value)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def tar_of(members: dict[str, bytes], kind: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def jpeg(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), [value % 256, 60 * (value // 256), 0], np.uint8)).save(out, "JPEG")
    return out.getvalue()


def _mat(**arrays: Any) -> bytes:
    from scipy.io import savemat

    out = io.BytesIO()
    savemat(out, arrays)
    return out.getvalue()


def cifar(name: str) -> Archives:
    """Pickles of [N, 3072] pixels, plane after plane; CIFAR-100's have two labels, of which the fine one counts."""
    rng = np.random.default_rng(100)
    many = name == "CIFAR100"
    folder, archive = ("cifar-100-python",) * 2 if many else ("cifar-10-batches-py", "cifar-10-python")
    classes = [f"fine_{i:02d}" for i in range(100)] if many else [f"class {i}" for i in range(10)]
    parts = {"train": ["train"], "val": ["test"]} if many else {
        "train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"],
    }  # fmt: skip
    members: dict[str, bytes] = {}
    samples: dict[str, Samples] = {"train": {}, "val": {}}
    for split, names in parts.items():
        for part in names:
            data = rng.integers(0, 256, (30, 3072), dtype=np.uint8)
            labels = rng.integers(0, len(classes), 30).tolist()
            batch: dict[str, Any] = {"batch_label": part, "data": data, "filenames": [f"{i}.png" for i in range(30)]}
            own = {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels]} if many else {}
            members[part] = pickle.dumps(batch | (own or {"labels": labels}), protocol=2)
            images = data.reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)
            start = len(samples[split])
            rows = enumerate(zip(labels, images, strict=True), start)
            samples[split] |= {f"{i:09d}": (label, image) for i, (label, image) in rows}
    names_file, key = ("meta", "fine_label_names") if many else ("batches.meta", "label_names")
    meta = {key: classes} | ({"coarse_label_names": [f"coarse_{i}" for i in range(20)]} if many else {})
    members[names_file] = pickle.dumps(meta, protocol=2)
    sums = {part: md5(data) for part, data in members.items()}
    packed = tar_of({f"{folder}/{part}": data for part, data in members.items()})

    def attributes(address: str) -> dict[str, Any]:
        lists = {split: [[part, sums[part]] for part in names] for split, names in parts.items()}
        return {
            "url": f"{address}{archive}.tar.gz", "tgz_md5": md5(packed), "train_list": lists["train"],
            "test_list": lists["val"], "meta": {"filename": names_file, "key": key, "md5": sums[names_file]},
        }  # fmt: skip

    return Archives(name, {f"{archive}.tar.gz": packed}, classes, samples, attributes)


def fashion_mnist() -> Archives:
    from torchvision.datasets import FashionMNIST

    rng = np.random.default_rng(3)
    files: dict[str, bytes] = {}
    samples: dict[str, Samples] = {}
    for split, part, n in (("train", "train", 40), ("val", "t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = struct.pack(">4I", 0x803, n, 28, 28) + images.tobytes()
        files[f"{part}-labels-idx1-ubyte.gz"] = struct.pack(">2I", 0x801, n) + labels.tobytes()
        samples[split] = {f"{i:09d}": (int(labels[i]), images[i]) for i in range(n)}
    packed = {name: gzip.compress(data, mtime=0) for name, data in files.items()}
    resources = [(name, md5(data)) for name, data in packed.items()]
    placed = {f"FashionMNIST/raw/{name}": data for name, data in packed.items()}
    attributes: Callable[[str], dict[str, Any]] = lambda address: {"mirrors": [address], "resources": resources}
    return Archives("FashionMNIST", placed, list(FashionMNIST.classes), samples, attributes)


def flowers102() -> Archives:
    """Two pictures a class; labels count from 1, picture numbers too, and a picture's split is in a file of its own."""
    from torchvision.datasets import Flowers102

    labels = np.random.default_rng(7).permutation(np.repeat(np.arange(1, 103), 3))
    numbers = np.random.default_rng(8).permutation(len(labels)) + 1
    ids = dict(zip(("trnid", "valid", "tstid"), np.split(numbers, [140, 200]), strict=True))
    pictures = {i: jpeg(i) for i in numbers.tolist()}
    files = {
        "102flowers.tgz": tar_of({f"jpg/image_{i:05d}.jpg": pictures[i] for i in sorted(pictures)}),
        "imagelabels.mat": _mat(labels=labels.astype(np.uint8)[None]),
        "setid.mat": _mat(**{key: rows.astype(np.uint16)[None] for key, rows in ids.items()}),
    }
    samples = {
        split: {f"flowers-102/jpg/image_{i:05d}.jpg": (int(labels[i - 1]) - 1, pictures[i]) for i in ids[key].tolist()}
        for split, key in (("train", "trnid"), ("val", "valid"))
    }
    sums = {key: (name, md5(files[name])) for key, name in zip(("image", "label", "setid"), files, strict=True)}
    placed = {f"flowers-102/{name}": data for name, data in files.items()}
    attributes: Callable[[str], dict[str, Any]] = lambda address: {"_download_url_prefix": address, "_file_dict": sums}
    return Archives("Flowers102", placed, list(Flowers102.classes), samples, attributes)


def imagenette(size: str = "full", last: bytes = b"") -> Archives:
    """Class folders named by WordNet ids. Of val, each class has its picture before `last`, a file more of the last."""
    from torchvision.datasets import Imagenette

    folder = "imagenette2" if size == "full" else f"imagenette2-{size.removesuffix('px')}"
    wnids = sorted(Imagenette._WNID_TO_CLASS)
    members: dict[str, bytes] = {}
    samples: dict[str, Samples] = {"train": {}, "val": {}}
    for split, each in (("train", 3), ("val", 1)):
        for label, wnid in enumerate(wnids):
            for i in range(each):
                name = f"{folder}/{split}/{wnid}/{wnid}_{i}.JPEG"
                members[name] = jpeg(50 * len(samples[split]) + i)
                samples[split][name] = (label, members[name])
    if last:
        name = f"{folder}/val/{wnids[-1]}/{wnids[-1]}_last.JPEG"
        members[name] = last
        samples["val"][name] = (len(wnids) - 1, last)
    packed = tar_of(members)
    attributes: Callable[[str], dict[str, Any]] = lambda address: {
        "_ARCHIVES": Imagenette._ARCHIVES | {size: (f"{address}{folder}.tgz", md5(packed))}
    }
    return Archives("Imagenette", {f"{folder}.tgz": packed}, wnids, samples, attributes)


def imagenet() -> tuple[Archives, dict[str, tuple[str, str]]]:
    """A tar of tars by class, one of numbered pictures, a devkit that says which is what; and torchvision's sums."""
    words = {"n01440764": "tench, Tinca tinca", "n02102040": "English springer", "n02979186": "cassette player"}
    wnids = list(words)
    numbers = dict(zip(wnids, (2, 3, 1), strict=True))  # the devkit counts otherwise than by name
    rows = [(numbers[w], w, words[w], "a gloss", 0) for w in wnids] + [(4, "n00001740", "entity", "a gloss", 2)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    samples: dict[str, Samples] = {"train": {}, "val": {}}
    tars = {}
    for label, wnid in enumerate(wnids):
        pictures = {f"{wnid}_{i}.JPEG": jpeg(40 * label + i) for i in range(2)}
        tars[f"{wnid}.tar"] = tar_of(pictures, "w")
        samples["train"] |= {f"train/{wnid}/{name}": (label, data) for name, data in pictures.items()}
    truth = [2, 0, 1, 2, 1]
    held = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(200 + i) for i in range(len(truth))}
    for label, (name, data) in zip(truth, held.items(), strict=True):
        samples["val"][f"val/{wnids[label]}/{name}"] = (label, data)
    inside = "ILSVRC2012_devkit_t12/data/"
    devkit = {
        f"{inside}meta.mat": _mat(synsets=np.array(rows, dtype=kinds)),
        f"{inside}ILSVRC2012_validation_ground_truth.txt": "".join(f"{numbers[wnids[c]]}\n" for c in truth).encode(),
    }
    files = {
        "ILSVRC2012_img_train.tar": tar_of(tars, "w"), "ILSVRC2012_img_val.tar": tar_of(held, "w"),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of(devkit),
    }  # fmt: skip
    sums = {
        part: (name, md5(data)) for part, (name, data) in zip(("train", "val", "devkit"), files.items(), strict=True)
    }
    return Archives("ImageNet", files, wnids, samples, lambda address: {}), sums


MAKERS: dict[str, Callable[[], Archives]] = {
    "CIFAR10": lambda: cifar("CIFAR10"), "CIFAR100": lambda: cifar("CIFAR100"), "FashionMNIST": fashion_mnist,
    "Flowers102": flowers102, "Imagenette": imagenette,
}  # fmt: skip


class Server:
    """Archives by their names, with faults.

    Attributes:
        faults: Name -> what happens instead of an answer: absent, cut (the connection ends half way), chunked (the
            same, in an answer without a length), broken (no HTTP), wrong (other bytes, as many) or stalled.
        asked: Names, in the order of the requests. torchvision asks twice: where a file is, and for the file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.asked: list[str] = []
        self.end = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(OSError):  # who asks where a file is, goes without reading it
                    server.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/")
        self.asked.append(name)
        fault, data = self.faults.get(name), self.files.get(name)
        if data is None or fault == "absent":
            return request.send_error(404)
        if fault == "broken":
            request.wfile.write(b"no such protocol\r\n\r\n")
            return None
        request.send_response(200)
        half = data[: len(data) // 2]
        if fault == "chunked":
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            request.wfile.write(f"{len(data):x}\r\n".encode() + half)
            return None
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(bytes(len(data)) if fault == "wrong" else half if fault in ("cut", "stalled") else data)
        if fault == "stalled":
            request.wfile.flush()
            self.end.wait()
        return None

    def close(self) -> None:
        self.end.set()
        self.http.shutdown()
        self.http.server_close()


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is reached directly, whatever proxies the environment names."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    try:
        yield server
    finally:
        server.close()
