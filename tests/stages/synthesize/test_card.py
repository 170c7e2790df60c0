"""A finished images folder can be put on a hub as it is: its card names the data, and `datasets` loads the folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from huggingface_hub import DatasetCard

import ddoq_ray
from ddoq_ray.data.image_set import EXTENSIONS, NewImage, PictureFormat, encode_picture, write_images
from ddoq_ray.stages.synthesize.card import CardFacts, dataset_card, title_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import CARD, Place, image_record, image_shard

FACTS = CardFacts(
    name="photos", method="ddoq", prior="my-prior", prior_id="0123abcd", teacher="my-teacher", ipc=2, images=6,
    shards=2, side=16, extension="png", digest="ff00", classes=("cat", "dog | wolf", "owl"), seed=7,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
WEIGHTS = [0.25, 0.75] * 3


def write_set(folder: Folder, form: PictureFormat) -> None:
    """As the stage leaves it."""
    for shard, rows in enumerate((range(4), range(4, 6))):
        made = [
            NewImage(i // 2, i % 2, WEIGHTS[i], "p", 7, encode_picture(IMAGES[i], form), extension=EXTENSIONS[form])
            for i in rows
        ]
        folder.publish_json(image_record(image_shard(shard)), write_images(folder, image_shard(shard), made))
    for name in ("started.json", "manifest.json"):
        folder.publish_json(name, {"stage": "synthesize", "shards": [{"name": "x"}]})
    folder.publish(CARD, dataset_card(dataclasses.replace(FACTS, extension=EXTENSIONS[form])).encode())


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_folder_loads_as_it_is(form: PictureFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder, extension = tmp_path / "images", EXTENSIONS[form]
    write_set(Folder(str(folder)), form)
    ours = [image.permute(1, 2, 0).numpy() for image, _, _ in ddoq_ray.load(str(folder))]
    data = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 6 and set(data.column_names) >= {extension, "cls", "json"}
    for i, row in enumerate(data):
        assert np.array_equal(np.asarray(row[extension].convert("RGB")), ours[i])
        assert (row["cls"], row["json"]["weight"]) == (i // 2, WEIGHTS[i])
    assert len(list(wds.WebDataset(str(folder / "images-{000000..000001}.tar"), shardshuffle=False))) == 6


def test_the_head_is_a_hubs_and_the_table_has_the_facts() -> None:
    text = dataset_card(FACTS)
    card = DatasetCard(text)
    assert card.data.license == "unknown" and card.data.size_categories == ["n<1K"]
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "images-*.tar"}]
    for row in (
        "| method | `ddoq` |", "| prior | my-prior (`0123abcd`) |", "| teacher | my-teacher |",
        "| images a class | 2 |", "| classes | 3 |", "| images | 6, in 2 tars |", "| side | 16 px, stored as png |",
        "| seed | 7 |", "| digest | `ff00` |", "| 1 | dog \\| wolf |", "optimal quantization of each class",
    ):  # fmt: skip
        assert row.lower() in text.lower(), row
    assert "| teacher | none |" in dataset_card(dataclasses.replace(FACTS, teacher=None))
    many = dataclasses.replace(FACTS, classes=tuple(f"n{i}" for i in range(21_841)), images=1_092_050)
    text = dataset_card(many)
    assert "20,841 more" in text and "| 999 | n999 |" in text and len(text) < 40_000
    assert DatasetCard(text).data.size_categories == ["1M<n<10M"]


def test_no_folder_of_this_machine_is_told() -> None:
    assert [title_of(p) for p in ("/home/me/my-prior/", "shipped:digits-prior", "org/DiT-XL-2-256")] == [
        "my-prior", "digits-prior", "DiT-XL-2-256",
    ]  # fmt: skip


def test_a_place_knows_its_method() -> None:
    assert Place().method == "" and Place.of_method("d4m", 10).method == "d4m"
