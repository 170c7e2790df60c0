"""select: baselines made of real images, as image sets.

`random` draws anew for each student; the others choose once: in latent space, from the run's latents, or by what the
teacher says of the images. All but `confident` weigh their images alike, as these baselines are used elsewhere: so a
row tells what the choice of images is worth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec
from ddoq_ray.execution.run import Run
from ddoq_ray.stages.cells import own_set
from ddoq_ray.stages.encode.step import Encode
from ddoq_ray.stages.select.choice import Choice
from ddoq_ray.stages.select.images import publish
from ddoq_ray.stages.step import Ask, ImageSetStep
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact, digest_of
from ddoq_ray.storage.latent_index import latent_index
from ddoq_ray.storage.layout import Place


@dataclass(frozen=True)
class Select(ImageSetStep):
    """An image set of chosen real images.

    Attributes:
        method: What chooses.
        draw: Which of the method's draws it is; 0 for one that chooses once.
    """

    stage = "synthesize"
    name = "select"

    method: MethodSpec
    at: Place
    draw: int = 0

    @property
    def chooser(self) -> ModuleType:
        """The module of the method."""
        return import_module(f"ddoq_ray.stages.select.{self.method.name}")

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The draw, and the size of the files."""
        facts: dict[str, Any] = {
            self.method.name: self.draw,
            "seed": config.seed,
            "ipc": config.ipc,
            "resize": config.encoder.resize,
            "shard_images": config.synthesizer.shard_images,
        }
        if self.method.reads or config.small_class != "error":
            facts["small_class"] = config.small_class  # which classes are drawn from, and how many images
        if "teacher" in self.method.reads:
            facts["teacher_batch"] = config.teacher.batch
        own = getattr(self.chooser, "settings", None)
        return facts if own is None else facts | own(config)

    def inputs(self, run: Run) -> dict[str, Any]:
        facts: dict[str, Any] = {"data": run.data.digest}
        if self.method.reads:  # how many images there are to choose from, too
            facts["latents"] = run.finished(Artifact(run.latents, Encode.name))["digest"]
        if "codebook" in self.method.reads:
            facts["codebook"] = run.finished(Artifact(run.dir / own_set(run.config).codebook, "quantize"))["digest"]
        if "teacher" in self.method.reads:
            facts["teacher"] = run.networks.scorer_id
            facts["teacher_outputs"] = digest_of([c.teacher_index for c in run.data.classes])[:32]
        return facts

    def asks(self, config: RunConfig) -> list[Ask]:
        if "teacher" in self.method.reads:  # before readers copy what was chosen, and gone by then
            return [Ask.of(config, "teacher", "teacher", config.labels.workers, "labels.workers")]
        return [Ask.of(config, "reader", "reader")]


def run(run: Run, step: Select) -> None:
    """Choose real images and publish them as an image set.

    Raises:
        ValueError: When the latents or the codebook that the method needs are not there.
    """
    start = time.time()
    artifact, facts = step.artifact(run.dir), step.identity(run)
    if artifact.begin(facts, overwrite=run.config.overwrite) == "done":
        return
    index = latent_index(run.latents, len(run.data.train))
    usable = index.counts.tolist()
    counts = {c.class_id: usable[c.class_id] if c.class_id < len(usable) else 0 for c in run.data.classes}
    choice = Choice(run, step.method.name, index, counts, step.at, step.draw, digest_of(facts))
    shards = publish(choice, step.chooser.choose(choice))
    images = sum(s["images"] for s in shards)
    for passing in (layout.EXCERPTS, layout.SCORES):
        artifact.folder.remove(passing)
    artifact.finish(
        facts,
        seconds=round(time.time() - start, 3),
        items=images,
        unit="images",
        bytes=sum(s["bytes"] for s in shards),
        shards=shards,
        digest=digest_of([s["sha256"] for s in shards]),
    )
    run.events.add("stage finished", stage="select", folder=step.at.root, images=images)
