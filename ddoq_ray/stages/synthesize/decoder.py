"""What a decoder actor does: rows of a codebook to one image shard."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from PIL import Image

from ddoq_ray.config import RunConfig
from ddoq_ray.config.synthesizer import SynthesizerConfig
from ddoq_ray.core.mosaics import mosaic, tile_masses, tiled
from ddoq_ray.core.rescaling import rescaled
from ddoq_ray.data.image_set import EXTENSIONS, NewImage, encode_picture, write_images
from ddoq_ray.data.samples import to_square
from ddoq_ray.execution.workers import device, pin_threads
from ddoq_ray.stages.synthesize.constant_images import constant_facts
from ddoq_ray.stages.synthesize.jobs import Job, Making, judge_of
from ddoq_ray.stages.synthesize.shard_records import publish_record
from ddoq_ray.storage.codebook import LastRows
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.latent_log import noise_of
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import ClassInfo, binary_rows

if TYPE_CHECKING:
    from ddoq_ray.models.priors.base import Sampling
    from ddoq_ray.models.synthesis import Asked, Made


@dataclass(frozen=True)
class ClassBook:
    """All centroids of a class: float32 [K, D], their weights float64 [K], and the class's distortion."""

    centroids: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float64]
    distortion: float

    @staticmethod
    def of(rows: pa.Table) -> ClassBook:
        """All of a class's rows, in the order of their centroid_id."""
        distortion = float(rows["distortion"][0].as_py())
        return ClassBook(binary_rows(rows["centroid"], "<f4"), rows["weight"].to_numpy(), distortion)

    def spread(self) -> npt.NDArray[np.float32]:
        return rescaled(self.centroids, self.weights, self.distortion)

    def masses(self, how: Making) -> npt.NDArray[np.float64]:
        """Of the images: those of their cells; the same for all where the cells are another set's."""
        if how.book is not None:
            return np.full(len(self.weights), 1 / len(self.weights))
        return tile_masses(self.weights, how.tiles)


@ray.remote
class Decoder:
    """Holds the prior and makes image shards."""

    def __init__(self, config: RunConfig, run_dir: Folder, classes: Sequence[ClassInfo]) -> None:
        from ddoq_ray.models.candidates import Candidates
        from ddoq_ray.models.classifiers import load_classifier
        from ddoq_ray.models.priors.load import load_prior
        from ddoq_ray.models.synthesis import Synthesizer

        pin_threads(config.cluster.threads)
        how, judge, candidates = config.synthesizer, judge_of(config), None
        if judge is not None:
            candidates = Candidates(how.candidates, load_classifier(judge, device()), how.keep)
        prior = load_prior(config.prior.given, device=device(), **config.prior.loading, **how.loading)
        self.synthesizer = Synthesizer(prior, config.seed, how.batch, candidates, how.image_size, how.retries)
        self.run_dir = run_dir
        self.how, self.seed, self.classes = how, config.seed, classes
        self.rows: dict[str, LastRows] = {}  # of each set
        # Of two units at a time, one has the prior. Both read from the same rows.
        self.at_prior, self.at_rows = threading.Lock(), threading.Lock()

    def run(self, job: Job) -> dict[str, Any]:
        """Make and publish one image shard; publishing it twice gives the same bytes.

        A batch is encoded while the next one is made; another unit's call has the prior while this one publishes.
        """
        how = job.how or Making(self.how)
        codebook = self.run_dir / (how.book or Place(job.folder)).codebook
        books, sampling = self._books(job, codebook), self._sampling(codebook, how.settings)
        asked, all_centroids = self._asked(job, books, how), {c: b.centroids for c, b in books.items()}
        with ThreadPoolExecutor(1, "encode") as thread:
            with self.at_prior:
                parts = [
                    (made, thread.submit(self._encoded, made.pictures))
                    for made in self._images(self.synthesizer.batches(asked, sampling, all_centroids), how)
                ]
            files = [data for _, encoded in parts for data in encoded.result()]
        facts = [fact for made, _ in parts for fact in made.facts]
        extension = EXTENSIONS[self.how.format]
        weights = {c: book.masses(how) for c, book in books.items()}
        images = [
            NewImage(c, k, float(weights[c][k]), self.classes[c].prompt, self.seed, data, fact, extension)
            for (c, k), data, fact in zip(job.unit.keys, files, facts, strict=True)
        ]
        record = write_images(self.run_dir / Place(job.folder).images, job.unit.name, images)
        pictures = (picture for made, _ in parts for picture in made.pictures)
        record |= constant_facts(zip(job.unit.keys, pictures, strict=True))
        return publish_record(self.run_dir, job, record | {"retried": sum("attempt" in fact for fact in facts)})

    def _books(self, job: Job, codebook: Folder) -> dict[int, ClassBook]:
        with self.at_rows:
            rows = self.rows.setdefault(job.folder, LastRows(codebook))
            tables = rows.of([r.class_id for r in job.unit.ranges], job.parts)
        return {c: ClassBook.of(table) for c, table in tables.items()}

    def _asked(self, job: Job, books: dict[int, ClassBook], how: Making) -> Asked:
        from ddoq_ray.models.synthesis import Asked

        centroids = {c: book.spread() if how.settings.rescale else book.centroids for c, book in books.items()}
        of = {c: tiled(len(book.centroids), how.tiles).tolist() for c, book in books.items()}
        keys = [(c, k) for c, image in job.unit.keys for k in of[c][image]]
        return Asked(
            np.stack([centroids[c][k] for c, k in keys]), [self.classes[c] for c, _ in keys], [k for _, k in keys]
        )

    def _images(self, batches: Iterator[Made], how: Making) -> Iterator[Made]:
        """The images that a unit is made of: the pictures themselves, or each several of them, side by side."""
        if how.tiles == 1:
            yield from batches
            return
        from ddoq_ray.models.synthesis import Made

        made = Made.joined(list(batches))
        factor, side = math.isqrt(how.tiles), self.synthesizer.image_size
        small = [to_square(Image.fromarray(picture), side // factor) for picture in made.pictures]
        images = [mosaic(small[i : i + how.tiles], factor, side) for i in range(0, len(small), how.tiles)]
        attempts = None if made.attempts is None else made.attempts.reshape(-1, how.tiles).max(axis=1)
        yield Made(np.stack(images), attempts=attempts)

    def _encoded(self, pictures: npt.NDArray[np.uint8]) -> list[bytes]:
        form = self.how.format
        quality = {} if form == "png" else {"quality": self.how.quality}
        return [encode_picture(picture, form, **quality) for picture in pictures]

    def _sampling(self, codebook: Folder, own: SynthesizerConfig) -> Sampling:
        from ddoq_ray.models.priors.base import Sampling

        # Centroids of noised latents are at the strength's level already.
        start = own.start if own.start == "noise" or noise_of(codebook) is None else "given"
        how = Sampling(own.strength, own.steps, start, self.synthesizer.prior.guidance_of(own.guidance))
        if start != "guided":
            return how
        return replace(how, guide_until=own.guide_until, guide_scale=own.guide_scale, guide_pool=own.guide_pool)
