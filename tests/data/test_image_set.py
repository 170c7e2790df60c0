"""A distilled set on disk, read back as arrays and as a torch dataset."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from support.counted_store import Counted, counted_store

import ddoq_ray
from ddoq_ray.data.image_set import (
    EXTENSIONS,
    NewImage,
    PictureFormat,
    encode_picture,
    load_image_arrays,
    read_images,
    write_images,
)
from ddoq_ray.data.samples import encode_png, to_square
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.folder import Folder

WEIGHTS = {0: [0.5, 0.3, 0.2], 1: [1.0], 4: [0.25, 0.75]}  # ragged: 3, 1 and 2 centroids


def picture(class_id: int, centroid_id: int) -> np.ndarray:
    return np.full((8, 8, 3), (class_id * 20, centroid_id * 40, 7), np.uint8)


def members(class_id: int, k: int, **changed: Any) -> list[tuple[str, bytes]]:
    name = f"{class_id:05d}-{k:04d}"
    facts = {"centroid_id": k, "weight": WEIGHTS[class_id][k], "prompt": f"p{class_id}", "seed": 0} | changed
    return [
        (f"{name}.png", encode_png(picture(class_id, k))), (f"{name}.cls", str(class_id).encode()),
        (f"{name}.json", json.dumps({k: v for k, v in facts.items() if v is not None}).encode()),
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    keys = [(c, k) for c, w in WEIGHTS.items() for k in range(len(w))]
    (tmp_path / "images").mkdir()
    for i, part in enumerate((keys[:4], keys[4:])):
        (tmp_path / f"images/images-{i:06d}.tar").write_bytes(write_tar([m for key in part for m in members(*key)]))
    return tmp_path


def test_written_as_it_is_read_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    made = [
        NewImage(c, k, weight, f"p{c}", 0, encode_png(picture(c, k)))
        for c, weights in WEIGHTS.items()
        for k, weight in enumerate(weights)
    ]
    record = write_images(Folder(str(tmp_path)), "images-000000", made)
    tar = (tmp_path / "images-000000.tar").read_bytes()
    assert tar == write_tar([m for image in made for m in members(image.class_id, image.centroid_id)])
    digest = hashlib.sha256(tar).hexdigest()
    assert record == {"name": "images-000000", "images": 6, "bytes": len(tar), "sha256": digest}
    again = list(read_images([str(tmp_path / "images-000000.tar")]))
    assert [(i.key, i.class_id, i.centroid_id, i.weight, i.prompt, i.data) for i in again] == [
        (i.key, i.class_id, i.centroid_id, i.weight, i.prompt, i.data) for i in made
    ]


@pytest.mark.parametrize(("form", "extension", "error"), [("png", "png", 0), ("jpeg", "jpg", 6), ("webp", "webp", 16)])
def test_every_format_is_written_and_read_back(tmp_path: Path, form: PictureFormat, extension: str, error: int) -> None:
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([y * 8, x * 8, 255 - y * 4 - x * 4], 2).astype(np.uint8)
    data = encode_picture(pixels, form)
    assert data == encode_picture(pixels, form) and EXTENSIONS[form] == extension
    write_images(Folder(str(tmp_path)), "images-000000", [NewImage(0, 0, 1.0, "", 0, data, extension=extension)])
    with tarfile.open(tmp_path / "images-000000.tar") as tar:
        assert tar.getnames() == [f"00000-0000.{e}" for e in (extension, "cls", "json")]
    image, label, weight = ddoq_ray.load(str(tmp_path))[0]
    far = np.abs(image.permute(1, 2, 0).numpy().astype(int) - pixels)
    assert far.max() <= error and (label, weight) == (0, 1.0)
    if form != "png":
        assert len(encode_picture(pixels, form, 30)) < len(data)


def test_load_by_run_directory_images_folder_or_pattern(run: Path) -> None:
    for path in (run, run / "images", f"{run}/images/images-*.tar", f"{run}/images/images-{{000000..000001}}.tar"):
        data = ddoq_ray.load(str(path))
        assert len(data) == 6
        keys = [(c, k) for c, weights in WEIGHTS.items() for k in range(len(weights))]
        assert [(i.class_id, i.centroid_id) for i in map(data.item, range(6))] == keys


def test_items_are_image_label_and_weight_of_mean_one_in_a_class(run: Path) -> None:
    data = ddoq_ray.load(str(run))
    image, label, weight = data[1]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8)
    assert image[:, 0, 0].tolist() == [0, 40, 7]
    assert (label, round(weight, 12)) == (0, 0.9)  # 3 x 0.3
    for c in WEIGHTS:
        assert np.isclose(np.mean([w for _, label, w in data if label == c]), 1)
    assert data.item(-1).prompt == "p4" and data.item(-1).key == "00004-0001"


def test_transform_gets_the_picture_and_a_loader_batches(run: Path) -> None:
    data = ddoq_ray.load(str(run), transform=lambda p: torch.tensor(np.asarray(p.resize((2, 2)))).float())
    images, labels, weights = next(iter(torch.utils.data.DataLoader(data, batch_size=6)))
    assert images.shape == (6, 2, 2, 3) and labels.tolist() == [0, 0, 0, 1, 4, 4]
    assert torch.allclose(weights, torch.tensor([1.5, 0.9, 0.6, 1, 0.5, 1.5], dtype=weights.dtype))


def test_arrays(run: Path) -> None:
    shards = sorted(str(p) for p in run.glob("images/*.tar"))
    arrays = load_image_arrays(shards, 4)
    assert arrays.images.shape == (6, 3, 8, 8) and arrays.images.dtype == np.uint8  # as stored: views are cut from it
    assert arrays.images[:, 1, 0, 0].tolist() == [0, 40, 80, 0, 0, 40]
    assert arrays.class_ids.tolist() == [0, 0, 0, 1, 4, 4]
    assert arrays.weights.tolist() == [w for ws in WEIGHTS.values() for w in ws]
    with pytest.raises(ValueError, match=r"no image in .*synthesize"):
        load_image_arrays([], 4)


def test_pictures_of_unlike_sizes_become_squares_of_the_given_side(tmp_path: Path) -> None:
    wide = [(n.replace("0000.", "0001."), b) for n, b in members(1, 0)]
    wide[0] = (wide[0][0], encode_png(np.full((5, 9, 3), 200, np.uint8)))
    shard = tmp_path / "images-000000.tar"
    shard.write_bytes(write_tar([*members(0, 0), *members(0, 1), *wide]))
    arrays = load_image_arrays([str(shard)], 4, 6)
    assert arrays.images.shape == (3, 3, 6, 6)
    assert arrays.images[:, 1, 3, 3].tolist() == [0, 40, 200]
    shard.write_bytes(write_tar(wide))
    assert load_image_arrays([str(shard)], 4, 6).images.shape == (1, 3, 5, 9)  # alone it is a set of one size
    enlarged = load_image_arrays([str(shard)], 12, 13).images
    np.testing.assert_array_equal(
        enlarged[0].transpose(1, 2, 0), to_square(Image.fromarray(np.full((5, 9, 3), 200, np.uint8)), 12)
    )


def test_a_picture_of_the_own_set_that_cannot_be_read_is_named(run: Path) -> None:
    shard = run / "images/images-000000.tar"
    broken = [(n, b[: len(b) // 2] if n.endswith(".png") else b) for n, b in members(0, 1)]
    shard.write_bytes(write_tar([*members(0, 0), *broken]))
    with pytest.raises(ValueError, match=r"images-000000\.tar: the picture of 00000-0001 cannot be read.*synthesize"):
        load_image_arrays([str(shard)], 8)
    with pytest.raises(ValueError, match="00000-0001"):
        ddoq_ray.load(str(run))[1]


def test_facts_that_are_no_facts_are_named(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    for place, body, words in (
        (2, b"{", "json or .cls of 00000-0000"), (1, b"cat", "json or .cls of 00000-0000"), (2, b"[]", "centroid_id"),
        (2, b'{"centroid_id": 0, "weight": NaN}', "weight nan.*0 to 1"),
    ):  # fmt: skip
        changed = members(0, 0)
        changed[place] = (changed[place][0], body)
        shard.write_bytes(write_tar(changed))
        with pytest.raises(ValueError, match=f"x.tar: .*{words}"):
            list(read_images([str(shard)]))


def test_what_is_no_distilled_set_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path=.*holds no"):
        ddoq_ray.load(str(tmp_path))
    with pytest.raises(ValueError, match=r"path=.*does not exist"):
        ddoq_ray.load(str(tmp_path / "nothing"))
    shard = tmp_path / "x.tar"
    for body, words in [
        (write_tar([("a.png", b""), ("a.cls", b"0")]), "sample a has .*a .json"),
        (write_tar(members(0, 0, weight=None)), "00000-0000.json has .*centroid_id and weight"),
        (b"no tar at all" * 100, "x.tar: .*made by synthesize"),
        (write_tar(members(0, 0))[:700], "x.tar: .*made by synthesize"),
    ]:
        shard.write_bytes(body)
        with pytest.raises(ValueError, match=words):
            list(read_images([str(shard)]))


class TestManyImages:
    """A set of 24 MB in four tars."""

    CLASSES, IPC, SIDE = 20, 20, 144

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        place, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
        for shard in range(4):
            made = []
            for c in range(shard * 5, shard * 5 + 5):
                for k in range(self.IPC):
                    pixels = rng.integers(0, 256, (self.SIDE, self.SIDE, 3), dtype=np.uint8)
                    pixels[0, 0] = c, k, 0
                    weight = (k + 1) / sum(range(1, self.IPC + 1))
                    made.append(NewImage(c, k, weight, f"p{c}", 0, encode_png(pixels)))
            write_images(Folder(str(place)), f"images-{shard:06d}", made)
        return place

    def test_workers_read_the_same_in_little_memory(self, folder: Path) -> None:
        size = sum(p.stat().st_size for p in folder.glob("*.tar"))
        assert size > 20e6
        tracemalloc.start()
        try:
            data = ddoq_ray.load(str(folder))
            held, peak = tracemalloc.get_traced_memory()
            for i in range(0, len(data), 7):
                data[i]
            _, read = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 300_000 and peak < 2_000_000 and read < 3_000_000
        assert len(pickle.dumps(data)) < 60 * len(data) + 2000
        loader = torch.utils.data.DataLoader(data, batch_size=64, num_workers=2)
        seen = [torch.stack([images[:, 0, 0, 0].long(), labels]) for images, labels, _ in loader]
        seen_classes = torch.cat(seen, 1)
        assert seen_classes[0].tolist() == seen_classes[1].tolist() == data.class_ids.tolist()

    def test_weights_are_for_a_sampler(self, folder: Path) -> None:
        data = ddoq_ray.load(str(folder))
        assert data.weights.dtype == np.float64 and data.class_ids.dtype == np.int64
        assert data.weights.shape == data.class_ids.shape == (len(data),)
        assert np.allclose([data.weights[data.class_ids == c].sum() for c in range(self.CLASSES)], 1)
        generator = torch.Generator().manual_seed(0)
        sampler = torch.utils.data.WeightedRandomSampler(data.weights, 20_000, generator=generator)
        drawn = np.bincount(np.fromiter(sampler, np.int64), minlength=len(data)) / 20_000
        assert np.abs(drawn - data.weights / self.CLASSES).max() < 0.003
        loader = torch.utils.data.DataLoader(
            data, batch_size=8, sampler=torch.utils.data.WeightedRandomSampler(data.weights, 8), num_workers=2
        )
        images, labels, weights = next(iter(loader))
        assert images.shape == (8, 3, self.SIDE, self.SIDE) and labels.dtype == torch.int64
        assert torch.allclose(weights, (images[:, 1, 0, 0].double() + 1) * self.IPC / 210)

    def test_shards_of_a_store_are_copied_once(self, folder: Path, tmp_path: Path) -> None:
        url = counted_store()
        for path in folder.glob("*.tar"):
            MemoryFileSystem().pipe_file(f"/store/images/{path.name}", path.read_bytes())
        data = ddoq_ray.load(url)
        size = sum(p.stat().st_size for p in folder.glob("*.tar"))
        assert sum(Counted.read_of(".tar")) == size and data.shards[0].startswith("counted://")
        plain = ddoq_ray.load(str(folder))
        assert torch.equal(data[37][0], plain[37][0]) and data[37][1:] == plain[37][1:]
        copies = Path(data._files[0]).parent
        worker = pickle.loads(pickle.dumps(data))
        del worker
        loader = torch.utils.data.DataLoader(data, batch_size=200, num_workers=2)
        assert [len(labels) for _, labels, _ in loader] == [200, 200]
        assert len(list(copies.iterdir())) == 4 and sum(Counted.read_of(".tar")) == size
        del data, loader
        gc.collect()
        assert not copies.exists()
        for _ in range(2):
            kept = ddoq_ray.load(url, cache=str(tmp_path / "cache"))
            assert kept.item(399).prompt == "p19"
        assert sum(Counted.read_of(".tar")) == 2 * size and len(list((tmp_path / "cache").iterdir())) == 4

    def test_a_set_that_is_made_anew_meanwhile_is_told(self, folder: Path, tmp_path: Path) -> None:
        tar = tmp_path / "images-000000.tar"
        tar.write_bytes((folder / "images-000000.tar").read_bytes())
        data = ddoq_ray.load(str(tmp_path))
        tar.write_bytes((folder / "images-000001.tar").read_bytes())
        with pytest.raises(ValueError, match=r"images-000000\.tar.*(load the set again|made by synthesize)"):
            data[50]
