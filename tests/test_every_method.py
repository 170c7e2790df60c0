"""Every method of the table on digits, through labels and students; and what each makes, made once more without Ray."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddoq_ray import pipeline
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config
from ddoq_ray.config.methods import METHODS
from ddoq_ray.core.balanced import balanced
from ddoq_ray.core.baselines import lloyd
from ddoq_ray.core.distortion import assign
from ddoq_ray.core.mosaics import tiled
from ddoq_ray.core.rng import philox
from ddoq_ray.data.collections import DIGIT_NAMES, digits
from ddoq_ray.data.image_set import DistilledImage, read_images
from ddoq_ray.data.samples import encode_png, read_samples, to_square
from ddoq_ray.models.classifiers import Classifier, Normalisation, build_classifier, load_classifier, save_classifier
from ddoq_ray.models.confidence import class_losses
from ddoq_ray.models.priors.base import Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.recovery import Recovery, recovered
from ddoq_ray.models.synthesis import Asked, Synthesizer
from ddoq_ray.stages.select.rded import crop_boxes
from ddoq_ray.storage.class_latents import class_latents
from ddoq_ray.storage.codebook import ClassRows, parts_with_classes
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import binary_rows

pytestmark = pytest.mark.slow

IPC, POOL, CROPS = 2, 12, 3
SETS = [m for m in METHODS if m not in ("ddoq", "ddoq-sqrt", "ddoq-uniform", "full")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher with batch norm, which the shipped one has not."""
    images, ids = digits()["train"]
    x = torch.from_numpy(np.stack([to_square(Image.fromarray(i).convert("RGB"), 16) for i in images]))
    x, y = x.permute(0, 3, 1, 2).float() / 255, torch.from_numpy(np.asarray(ids, np.int64))
    model = build_classifier("convnet3-w16-batch", 10, 16, Normalisation((0.31,) * 3, (0.35,) * 3), 0, DIGIT_NAMES)
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for step in range(40):
        rows = philox("teacher", step).choice(len(x), 100, replace=False)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("teacher") / "small"
    save_classifier(model.eval(), folder)
    return folder


@pytest.fixture(scope="module")
def other_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each digit in class folders, with weights."""
    folder = tmp_path_factory.mktemp("set")
    images, ids = digits()["train"]
    weights = {}
    for c, name in enumerate(DIGIT_NAMES):
        (folder / name).mkdir()
        for k, i in enumerate(np.flatnonzero(np.asarray(ids) == c)[:IPC].tolist()):
            (folder / name / f"{k}.png").write_bytes(encode_png(images[i]))
            weights[f"{name}/{k}.png"] = 3.0 if k else 1.0
    (folder / "weights.json").write_text(json.dumps(weights))
    return folder


def keys(teacher: Path, other_set: Path, run_dir: Path) -> list[str]:
    return [
        f"ipc={IPC}", "num_seeds=1", f"baselines=[{','.join(METHODS)}]", f"teacher.path={teacher}",
        f"images.path={other_set}", "images.name=dm", "protocol.steps=4", "protocol.eval_every=4",
        "synthesizer.shard_images=8", "recovery.iterations=4", "recovery.batch=4", "recovery.jitter=1",
        f"rded.pool={POOL}", f"rded.crops={CROPS}", "rded.factor=2", f"run_dir={run_dir}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(teacher: Path, other_set: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    stages = "stages=[prepare,encode,quantize,synthesize,label,train,evaluate]"
    return load_config([*keys(teacher, other_set, tmp_path_factory.mktemp("every") / "run"), stages])


@pytest.fixture(scope="module")
def run(config: RunConfig, ray_here: None) -> Folder:
    pipeline.run(config)
    return Folder(config.folder)


@pytest.fixture(scope="module")
def judge(teacher: Path) -> Classifier:
    return load_classifier(teacher)


def images_of(run: Folder, place: str) -> list[DistilledImage]:
    images = run / place
    return list(read_images([images.path(n) for n in images.names("images-*.tar")]))


def pixels(image: DistilledImage) -> np.ndarray:
    return np.asarray(image.picture)


def place_of(method: str) -> str:
    return Place.of_method(method, IPC).root + ("/draw-0/images" if method == "random" else "/images")


def book_of(run: Folder, codebook: str) -> dict[int, Any]:
    names, classes, _ = parts_with_classes(run / codebook)
    rows = ClassRows(run / codebook, dict(zip(names, classes, strict=True)))
    return {c: rows.of(c) for own in classes for c in own}


def real_images(run: Folder) -> dict[int, list[np.ndarray]]:
    """class_id -> its images, in the log's order."""
    data = Data.load(run)
    found: dict[int, list[np.ndarray]] = {c.class_id: [] for c in data.classes}
    for url in data.train_urls:
        for sample in read_samples(url, len(found), lambda bad: None):
            found[sample.class_id].append(np.asarray(sample.image))
    return found


def test_every_method_is_labelled_and_trained(run: Folder) -> None:
    rows = run.read_json("report/rows.json")
    assert [row["method"] for row in rows] and {row["method"] for row in rows} == {*METHODS, "dm"}
    assert all(row["top1_pct"] is not None for row in rows)
    for method in (*SETS, "dm"):
        images = images_of(run, place_of(method))
        assert Counter(i.class_id for i in images) == dict.fromkeys(range(10), IPC), method
        for c in range(10):
            assert sum(i.weight for i in images if i.class_id == c) == pytest.approx(1), method
        assert not run.names(f"{place_of(method)}/.excerpts/*") and not run.names(f"{place_of(method)}/.scores/*")


def test_confident_is_the_surest_of_each_cell(run: Folder, judge: Classifier) -> None:
    real, books = real_images(run), book_of(run, "codebook")
    chosen = {(i.class_id, i.centroid_id): i for i in images_of(run, place_of("confident"))}
    for c, x in class_latents(run / "latents", len(Data.load(run).train), range(10)):
        centroids, weights = binary_rows(books[c]["centroid"], "<f4"), books[c]["weight"].to_numpy()
        cells = assign(x, centroids)[0]
        seen = np.stack([to_square(Image.fromarray(picture), 16) for picture in real[c]])
        losses = class_losses(judge, seen, np.full(len(seen), c))
        for k in range(IPC):
            best = min(np.flatnonzero(cells == k).tolist(), key=lambda i: losses[i])
            assert losses[best] <= losses[cells == k].min() + 1e-5
            assert (pixels(chosen[c, k]) == real[c][best]).all()
            assert chosen[c, k].weight == pytest.approx(weights[k])


def test_rded_is_mosaics_of_the_surest_crops(run: Folder, judge: Classifier) -> None:
    data = Data.load(run)
    shards: list[tuple[int, int, int]] = []  # of each image of class 3: shard, class, position there
    for number, url in enumerate(data.train_urls):
        mine = [s for s in read_samples(url, 10, lambda bad: None) if s.class_id == 3]
        shards += [(number, 3, i) for i in range(len(mine))]
    real = real_images(run)[3]
    pool = np.sort(philox(0, "rded", 3).choice(len(real), size=POOL, replace=False))
    best = []
    for i in pool.tolist():
        picture = Image.fromarray(real[i])
        crops = [
            np.asarray(picture.crop(tuple(box)).resize((8, 8), Image.Resampling.BILINEAR))
            for box in crop_boxes(picture.size, 0, shards[i], CROPS).tolist()
        ]
        padded = np.stack([np.full((16, 16, 3), 0.31 * 255, np.float32) for _ in crops])
        padded[:, 4:12, 4:12] = np.stack(crops)
        with torch.inference_mode():
            logits = judge(torch.from_numpy(padded).permute(0, 3, 1, 2) / 255)
        losses = -logits.log_softmax(1)[:, 3]
        best.append((float(losses.min()), crops[int(losses.argmin())]))
    tiles = [crop for _, crop in sorted(best, key=lambda pair: pair[0])[: 4 * IPC]]
    made = [pixels(i) for i in images_of(run, place_of("rded")) if i.class_id == 3]
    for i in range(IPC):
        above = np.concatenate([tiles[i], tiles[i + IPC]], axis=1)
        below = np.concatenate([tiles[i + 2 * IPC], tiles[i + 3 * IPC]], axis=1)
        assert (made[i] == np.concatenate([above, below])).all()


def synthesized(config: RunConfig, run: Folder, rows: list[tuple[int, int, np.ndarray]], start: Any) -> np.ndarray:
    """Pictures of (class_id, centroid_id, centroid), in one batch."""
    data, own = Data.load(run), config.synthesizer
    classes = json.loads(run.read("data/classes.json"))
    infos = [type(data.classes[0])(**row) for row in classes]
    made = Synthesizer(load_prior(config.prior.given), config.seed, own.batch)
    asked = Asked(np.stack([x for *_, x in rows]), [infos[c] for c, _, _ in rows], [k for _, k, _ in rows])
    return made.pictures(asked, Sampling(own.strength, own.steps, start, 1.0)).pictures


def test_stitched_images_are_four_centroids_at_half_the_side(config: RunConfig, run: Folder) -> None:
    books = book_of(run, "compare/stitched-ipc2/codebook")
    assert all(len(rows) == 4 * IPC for rows in books.values())
    first = images_of(run, place_of("stitched"))[:8]  # a unit
    of = tiled(4 * IPC, 4)
    keys = [(i.class_id, k) for i in first for k in of[i.centroid_id].tolist()]
    rows = [(c, k, binary_rows(books[c]["centroid"], "<f4")[k]) for c, k in keys]
    small = [to_square(Image.fromarray(p), 8) for p in synthesized(config, run, rows, "noised")]
    for n, image in enumerate(first):
        a, b, c, d = small[4 * n : 4 * n + 4]
        whole = np.concatenate([np.concatenate([a, b], axis=1), np.concatenate([c, d], axis=1)])
        assert (pixels(image) == whole).all()
        weights = books[image.class_id]["weight"].to_numpy()
        assert image.weight == pytest.approx(weights[of[image.centroid_id]].sum())


def test_noise_init_needs_no_centroid(config: RunConfig, run: Folder) -> None:
    first = images_of(run, place_of("noise-init"))[:8]
    rows = [(i.class_id, i.centroid_id, np.zeros(64, np.float32)) for i in first]
    made = synthesized(config, run, rows, "noise")
    assert all((pixels(i) == p).all() and i.weight == 1 / IPC for i, p in zip(first, made, strict=True))


def test_uniform_grid_is_the_barycenter(config: RunConfig, run: Folder) -> None:
    books = book_of(run, "compare/uniform-grid-ipc2/codebook")
    for c, x in class_latents(run / "latents", len(Data.load(run).train), [0, 7]):
        start, _ = lloyd(x, IPC, seed=config.seed, class_id=c)
        grid = balanced(x, start, max_rounds=30).centroids
        assert (binary_rows(books[c]["centroid"], "<f4") == grid).all()


def test_recovered_images_are_those_of_a_teacher_alone(config: RunConfig, run: Folder, judge: Classifier) -> None:
    sets = {}
    for method in ("sre2l", "cda"):
        sets[method] = {(i.class_id, i.centroid_id): pixels(i) for i in images_of(run, place_of(method))}
        direct = recovered(judge, np.arange(4), Recovery(config.recovery, method == "cda"), (0, "recover", 0, 0))
        assert all((sets[method][c, 0] == direct[c]).all() for c in range(4))
        last = recovered(judge, np.array([8, 9]), Recovery(config.recovery, method == "cda"), (0, "recover", 8, 1))
        assert (sets[method][9, 1] == last[1]).all()
    assert any((sets["sre2l"][key] != sets["cda"][key]).any() for key in sets["cda"])


def test_a_given_set_keeps_its_files_and_its_weights(run: Folder, other_set: Path) -> None:
    for image in images_of(run, place_of("dm")):
        file = other_set / DIGIT_NAMES[image.class_id] / f"{image.centroid_id}.png"
        assert image.data == file.read_bytes()
        assert image.weight == (0.75 if image.centroid_id else 0.25)


def test_other_workers_make_the_same_bytes_and_what_is_there_is_kept(
    run: Folder, teacher: Path, other_set: Path, tmp_path: Path
) -> None:
    copy = Folder(str(tmp_path / "run"))
    shutil.copytree(run.uri, copy.uri, ignore=shutil.ignore_patterns("students", "labels", "report"))
    before = {}
    for method in (*SETS, "dm"):
        place = place_of(method)
        before[method] = (copy / place).read_json("manifest.json")["digest"]
        names = (copy / place).names("images-*.tar")
        copy.remove(f"{place}/manifest.json")
        for name in names[1:]:  # a run that was cut off after its first shard
            copy.remove(f"{place}/{name}")
            copy.remove(f"{place}/.records/{name.removesuffix('.tar')}.json")
    kept = {m: Path(copy.path(f"{place_of(m)}/images-000000.tar")).stat().st_ino for m in before}
    one = ["synthesizer.max_workers=1", "labels.workers=1", "stages=[synthesize]"]
    pipeline.run(load_config([*keys(teacher, other_set, Path(copy.uri)), *one]))
    for method, digest in before.items():
        place = copy / place_of(method)
        assert place.read_json("manifest.json")["digest"] == digest, method
        assert Path(place.path("images-000000.tar")).stat().st_ino == kept[method], method
    png = images_of(copy, place_of("rded"))[0].data
    assert Image.open(io.BytesIO(png)).size == (16, 16)
