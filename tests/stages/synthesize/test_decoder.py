"""What a decoder publishes: the same shards alone and two at once, in every format."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddoq_ray.config.compose import load_config
from ddoq_ray.config.methods import SPECS
from ddoq_ray.data.image_set import read_images
from ddoq_ray.data.samples import to_square
from ddoq_ray.stages.synthesize.decoder import Decoder
from ddoq_ray.stages.synthesize.jobs import Job, image_jobs
from ddoq_ray.stages.synthesize.shard_records import published
from ddoq_ray.stages.synthesize.step import Synthesize
from ddoq_ray.storage.codebook import Account, write_part
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import ClassInfo, Codebook

SHAPE = (4, 4, 4)  # of the digits' prior
CLASSES = [ClassInfo(c, f"{c}", f"digit {c}", c, c) for c in range(3)]


def decoder(run: Folder, *keys: str) -> Any:
    """The actor's class in this process, without Ray."""
    plain = Decoder.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    return plain(load_config(["synthesizer.batch=2", "synthesizer.steps=10", *keys]), run, CLASSES)


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    rng = np.random.default_rng(0)
    books = [
        Codebook(c, rng.standard_normal((4, 64)).astype(np.float32), np.arange(1, 5), 1.0, np.arange(1, 5))
        for c in range(3)
    ]
    folder = Folder(str(tmp_path / "run"))
    write_part(folder / "codebook", 0, books, Account([], {}, []), latent_shape=SHAPE, prior_id="prior")
    return folder


def shards(run: Folder) -> dict[str, bytes]:
    return {name: run.read(name) for name in run.names("images/*.tar")}


def test_two_units_at_once_are_the_same_bytes_as_one_after_another(run: Folder) -> None:
    jobs = image_jobs(run, "", 5)
    assert [len(job.unit) for job in jobs] == [5, 5, 2]
    made = decoder(run)
    records = {job.name: made.run(job) for job in jobs}
    alone = shards(run)
    assert published(run, jobs) == records
    (run / "images").remove()
    inside, most, plain = [0], [0], made.synthesizer.batches

    def counted(*given: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        yield from plain(*given)
        inside[0] -= 1

    made.synthesizer.batches = counted
    with ThreadPoolExecutor(2) as calls:
        assert dict(zip([job.name for job in jobs], calls.map(made.run, jobs), strict=True)) == records
    assert shards(run) == alone and most == [1]  # the prior makes one unit at a time


def test_the_prior_is_free_while_a_unit_is_published(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first unit publishes only once the second has been made."""
    jobs, made = image_jobs(run, "", 6), decoder(run)
    second = threading.Event()
    plain = Folder.publish

    def waiting(self: Folder, name: str, data: bytes) -> None:
        if name == "images-000000.tar":
            assert second.wait(30), "the prior was held while this unit was published"
        else:
            second.set()
        plain(self, name, data)

    monkeypatch.setattr(Folder, "publish", waiting)
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(made.run, jobs[0])
        calls.submit(made.run, jobs[1]).result()
        first.result()
    assert len(shards(run)) == 2


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
def test_other_formats_hold_nearly_the_same_pictures(run: Folder, form: str, extension: str) -> None:
    job: Job = image_jobs(run, "", 12)[0]

    def pictures() -> list[np.ndarray]:
        return [np.asarray(i.picture).astype(int) for i in read_images([run.path(f"{job.name}.tar")])]

    decoder(run).run(job)
    plain, size = pictures(), run.size(f"{job.name}.tar")
    decoder(run, f"synthesizer.format={form}", "synthesizer.quality=98").run(job)
    assert np.mean([np.abs(a - b).mean() for a, b in zip(plain, pictures(), strict=True)]) < 4
    assert f".{extension}".encode() in run.read(f"{job.name}.tar") and size


def test_quality_is_refused_where_nothing_is_lost() -> None:
    with pytest.raises(ValueError, match=r"synthesizer\.quality has no effect .*synthesizer\.format=png"):
        load_config(["synthesizer.quality=80"])
    with pytest.raises(ValueError, match=r"synthesizer\.quality=0: expected 1 to 100"):
        load_config(["synthesizer.format=jpeg", "synthesizer.quality=0"])
    assert load_config(["synthesizer.format=webp", "synthesizer.quality=80"]).synthesizer.quality == 80


def pictures_of(
    run: Folder, made: Any, rows: list[tuple[int, int]], start: Any, books: np.ndarray | None
) -> np.ndarray:
    """The pictures of (class_id, centroid_id) by the decoder's own synthesizer; zeros for centroids without a book."""
    from ddoq_ray.models.priors.base import Sampling
    from ddoq_ray.models.synthesis import Asked

    x = np.stack([np.zeros(64, np.float32) if books is None else books[c, k] for c, k in rows])
    asked = Asked(x, [CLASSES[c] for c, _ in rows], [k for _, k in rows])
    return made.synthesizer.pictures(asked, Sampling(0.1, 10, start, 1.0)).pictures


def test_stitched_images_are_their_centroids_at_half_the_side_with_all_their_mass(run: Folder) -> None:
    step = Synthesize(Place("other"), SPECS["stitched"])
    config = load_config(["synthesizer.batch=2", "synthesizer.steps=10"])
    making = step.making(config)
    assert (making.tiles, making.book) == (4, None)
    books = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32)
    counts = np.arange(1, 5)
    books_of = [Codebook(c, books[c], counts, 1.0, counts) for c in range(3)]
    write_part(run / "other/codebook", 0, books_of, Account([], {}, []), latent_shape=SHAPE, prior_id="prior")
    made = decoder(run)
    (job,) = image_jobs(run, "other", 8, "set", making)
    assert job.unit.keys == [(0, 0), (1, 0), (2, 0)]  # four centroids each
    made.run(job)
    images = list(read_images([run.path(f"{job.name}.tar")]))
    small = pictures_of(run, made, [(c, k) for c in range(3) for k in range(4)], "noised", books)
    for image in images:
        tiles = [to_square(Image.fromarray(small[4 * image.class_id + k]), 8) for k in range(4)]
        above, below = np.concatenate(tiles[:2], axis=1), np.concatenate(tiles[2:], axis=1)
        assert (np.asarray(image.picture) == np.concatenate([above, below])).all()
        assert image.weight == pytest.approx(1)


def test_noise_init_takes_the_numbers_of_the_runs_own_codebook_and_no_centroid(run: Folder) -> None:
    step = Synthesize(Place("other"), SPECS["noise-init"])
    making = step.making(load_config(["synthesizer.batch=2", "synthesizer.steps=10"]))
    assert making.book == Place() and making.settings.start == "noise"
    made = decoder(run)
    first, *_ = image_jobs(run, "other", 4, "set", making)
    made.run(first)
    images = list(read_images([run.path(f"other/images/{first.unit.name}.tar")]))
    assert [(i.class_id, i.centroid_id, i.weight) for i in images] == [(0, k, 0.25) for k in range(4)]
    plain = pictures_of(run, made, [(0, k) for k in range(4)], "noise", None)
    assert all((np.asarray(i.picture) == p).all() for i, p in zip(images, plain, strict=True))


def test_what_a_set_of_tiles_is_known_by() -> None:
    config = load_config([])
    own, stitched, noise = (Synthesize(Place(), SPECS[m]).settings(config) for m in ("ddoq", "stitched", "noise-init"))
    assert stitched == own | {"tiles": 4}
    assert noise["synthesizer"]["start"] == "noise" and "strength" not in noise["synthesizer"]
