"""A run directory of every kind of artifact, as the formats' own writers leave it: whatever is damaged is named."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.tar_writing import write_tar
from ddoq_ray.storage.artifact import Artifact, digest_of, with_check
from ddoq_ray.storage.at_rest import Seen, damaged, events, finished_stages, set_aside
from ddoq_ray.storage.codebook import Account, read_record, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelGrid
from ddoq_ray.storage.label_log import Making, write_labels
from ddoq_ray.storage.parquet import table_bytes
from ddoq_ray.storage.records import (
    ChunkRecord,
    ClassCounts,
    Codebook,
    ShardDone,
    ShardInfo,
    fixed_binary,
    latent_schema,
    shard_lines,
)

SHAPE = (1, 2, 2)
PROMISED = {"data": "prepare", "latents": "encode", "codebook": "quantize", "images": "synthesize"}
PROMISED |= {"labels/a": "label", "students/b": "train"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    whole = Folder(str(place))
    data, latents, codebook, images = (whole / name for name in list(PROMISED)[:4])
    artifacts = {name: Artifact(whole / name, stage) for name, stage in PROMISED.items()}
    for artifact in artifacts.values():
        artifact.begin({"made": 1})
    shards = []
    for i in range(2):
        tar = write_tar([(f"{i}.png", bytes(range(256))), (f"{i}.cls", b"0")])
        data.publish(f"train/train-{i:06d}.tar", tar)
        held = ClassCounts({0: 1})
        shards.append(ShardInfo(f"data/train/train-{i:06d}.tar", 1, len(tar), held, "d", sha256=digest_of(tar)))
        data.publish_json(f"records/train-{i:06d}.json", with_check({"plan": i}))
        rows = np.full((3, 4), i, np.float16)
        columns = [pa.array(["a", "b", "c"]), pa.array(np.zeros(3, np.int32)), fixed_binary(rows)]
        file = table_bytes(pa.Table.from_arrays(columns, schema=latent_schema(SHAPE, "p")))
        name = f"shard-{i:06d}"
        latents.publish(f"{name}/chunk-00000.parquet", file)
        chunk = ChunkRecord(f"{name}/chunk-00000.parquet", 3, ClassCounts({0: 3}), digest_of(file))
        latents.publish(f"{name}/done.json", ShardDone(i, (chunk,), ClassCounts({0: 3}), 0).dumps())
        counts = np.array([2, 1])
        book = Codebook(i, np.ones((2, 4), np.float32), counts, 0.5, counts)
        write_part(codebook, i, [book], Account([], {"clvq": 1}, []), latent_shape=SHAPE, prior_id="p")
    data.publish("shards.json", b"".join(shard_lines(shards)))
    data.publish("val-shards.json", b"[]\n")
    data.publish_json("source-classes.json", [])
    made = [write_images(images, f"images-{i:06d}", [NewImage(0, i, 1.0, "", 0, b"x" * 99)]) for i in range(2)]
    for row in made:
        images.publish_json(f".records/{row['name']}.json", with_check(row))
    images.publish("README.md", b"# A card\n")
    grid = LabelGrid.of((6, 4), 4, batch=3, file_bytes=1 << 20, file_labels=12)
    for label_file in grid.all():
        write_labels(
            whole / "labels/a",
            label_file,
            Making(grid, "logits", digest_of(0), (6, 8, 8)),
            lambda epoch, first, end: (np.full((end - first, 4), epoch, np.uint8), b""),
        )
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        whole.publish(f"students/b/{name}", name.encode() * 9)
    artifacts["data"].finish({"made": 1})
    digests = [[c.sha256 for c in ShardDone.loads(p.read_bytes()).chunks] for p in sorted(place.rglob("done.json"))]
    artifacts["latents"].finish({"made": 1}, digest=digest_of(digests), shards=2, kept=True)
    parts = [read_record(codebook, p).digest for p in range(2)]
    artifacts["codebook"].finish({"made": 1}, digest=digest_of(parts), parts=2)
    artifacts["images"].finish({"made": 1}, shards=made)
    artifacts["labels/a"].finish({"made": 1}, grid=dataclasses.asdict(grid), codec="logits")
    artifacts["students/b"].finish({"made": 1})
    return place


def files(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


def test_every_file_is_looked_at_and_a_whole_run_has_no_damage(run: Path) -> None:
    seen = Seen()
    assert list(damaged(Folder(str(run)), PROMISED, seen)) == []
    assert seen.files == len(files(run))
    assert seen.bytes == sum((run / name).stat().st_size for name in files(run))


def test_any_bit_of_any_file_and_every_length_is_told_by_name(run: Path) -> None:
    """Six places of each file, one bit of each; three lengths; and the file gone."""
    rng = np.random.default_rng(0)
    for name in files(run):
        path = run / name
        data = path.read_bytes()
        record = name.endswith(".json")
        changes: list[bytes | None] = [None, b"", data[: len(data) // 2], data.rstrip()[:-1]]
        for at in rng.integers(len(data), size=6).tolist():
            if not (record and data[at : at + 1].isspace()):  # which says the same
                changes.append(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :])
        try:
            for change in changes:
                path.unlink() if change is None else path.write_bytes(change)
                found = [d.file for d in damaged(Folder(str(run)), PROMISED)]
                assert found == [name], f"{name}: {change if change is None else len(change)} of {len(data)}"
        finally:
            path.write_bytes(data)


def test_a_run_under_way_is_looked_at_as_far_as_its_records_go(run: Path, tmp_path: Path) -> None:
    import shutil

    there = tmp_path / "run"
    shutil.copytree(run, there)
    for name in ("latents/manifest.json", "codebook/manifest.json", "images/manifest.json", "labels/a/manifest.json"):
        (there / name).unlink()
    (there / "latents/shard-000001/done.json").unlink()  # not encoded yet
    (there / "images/images-000001.tar").unlink()
    promised = {"data": "prepare"}
    assert [d.file for d in damaged(Folder(str(there)), promised)] == ["images/images-000001.tar"]
    assert {d.file for d in damaged(Folder(str(there)), PROMISED)} >= {"latents/manifest.json", "images/manifest.json"}


def test_what_is_set_aside_is_kept_and_gone_from_its_place(run: Path, tmp_path: Path) -> None:
    import shutil

    there = tmp_path / "run"
    shutil.copytree(run, there)
    (there / "codebook/part-00001.parquet").write_bytes(b"damaged")
    (there / "images/started.json").unlink()
    folder = Folder(str(there))
    found = list(damaged(folder, PROMISED))
    assert [(d.file, d.command) for d in found] == [
        ("codebook/part-00001.parquet", "quantize"),
        ("images/started.json", "synthesize"),
    ]
    place = there / set_aside(folder, found)
    moved = ["codebook/manifest.json", "codebook/part-00001.json", "codebook/part-00001.parquet"]
    assert files(place) == moved and not any((there / name).exists() for name in moved)
    assert (place / moved[2]).read_bytes() == b"damaged"
    assert (there / "codebook/part-00000.parquet").exists()
    assert json.loads((there / "images/started.json").read_text())["identity"] == {"made": 1}, "the manifest says it"


def test_stages_are_finished_until_they_are_begun_again(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert finished_stages(folder) == set()
    lines = io.StringIO()
    for event, stages in (("run started", ["prepare", "encode"]), ("run finished", None), ("run started", ["encode"])):
        print(json.dumps({"event": event} | ({"stages": stages} if stages else {})), file=lines)
    folder.publish("events.jsonl", lines.getvalue().encode() + b'{"event": "wor')
    assert finished_stages(folder) == {"prepare"}


@pytest.mark.parametrize(
    "odd", [b'{"time": "x", "stages": 5}', b'{"time": 1e30, "stages": null}', b'{"time": null, "stages": [["a"]]}']
)
def test_events_of_another_version_are_read_as_far_as_they_go(odd: bytes, tmp_path: Path) -> None:
    run = Folder(str(tmp_path))
    whole = b'{"time": 3, "event": "run started", "stages": ["encode"]}\n{"event": "run finished"}\n'
    run.publish("events.jsonl", whole + odd.replace(b"{", b'{"event": "run started", ') + b"\n5\n" + b"[" * 200_000)
    assert list(events(run))[-1] == {"event": "run started"}
    assert finished_stages(run) == {"encode"}
