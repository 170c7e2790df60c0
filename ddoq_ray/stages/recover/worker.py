"""What a recovering actor does: one image of each of some classes, by gradients through the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.data.image_set import NewImage, write_images
from ddoq_ray.data.samples import encode_png
from ddoq_ray.execution.workers import device, pin_threads
from ddoq_ray.stages.synthesize.jobs import Job
from ddoq_ray.stages.synthesize.shard_records import publish_record
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place
from ddoq_ray.storage.records import ClassInfo


@ray.remote
class Recoverer:
    """Holds the first teacher and makes image shards."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Folder,
        classes: Sequence[ClassInfo],
        images: Mapping[int, int],
        curriculum: bool,
    ) -> None:
        """`images`: class_id -> how many a class has in the set."""
        from ddoq_ray.models.classifiers import load_classifier
        from ddoq_ray.models.recovery import Recovery

        pin_threads(config.cluster.threads)
        self.teacher = load_classifier(config.teacher.paths[0], device())
        self.how = Recovery(config.recovery, curriculum)
        self.seed, self.run_dir, self.classes, self.images = config.seed, run_dir, classes, images

    def run(self, job: Job) -> dict[str, Any]:
        """Make and publish one image shard; publishing it twice gives the same bytes."""
        from ddoq_ray.models.recovery import recovered

        keys, seed = job.unit.keys, self.seed
        indices = np.asarray([self.classes[c].teacher_index for c, _ in keys], np.int64)
        # A batch is known by its first image: sre2l and cda begin with the same noise.
        pictures = recovered(self.teacher, indices, self.how, (seed, "recover", *keys[0]))
        made = [
            NewImage(c, k, 1 / self.images[c], self.classes[c].prompt, seed, encode_png(picture))
            for (c, k), picture in zip(keys, pictures, strict=True)
        ]
        record = write_images(self.run_dir / Place(job.folder).images, job.unit.name, made)
        return publish_record(self.run_dir, job, record)
