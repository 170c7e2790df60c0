"""A teacher actor: it labels units of views, and names real images for the check that comes first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.execution.workers import device, pin_threads
from ddoq_ray.stages.evaluate.validation import Refused, Validation, in_batches, scored_images
from ddoq_ray.stages.label.autoencoder_check import LEAST, PIXELS, sample_of
from ddoq_ray.stages.label.images import SharedImages
from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.label_grid import LabelFile, LabelGrid
from ddoq_ray.storage.label_log import Making, write_labels

if TYPE_CHECKING:  # torch: only in the actor
    from ddoq_ray.models.labelling import Labeller

TORCHVISION = "torchvision:"
COST_VIEWS = 256  # of which it is measured what codecs cost
PART = 0.5  # of the memory that is free on a GPU, for an image set: beside it are activations, and other actors


@dataclass(frozen=True)
class LabelUnit:
    """One file of labels.

    Attributes:
        labels: Folder of the labels, relative to the run directory.
        codec: What packs them.
        file: Which of them.
        grid: All of them.
        made_from: Digest of what they are made from.
        images: The set.
    """

    labels: str
    codec: str
    file: LabelFile
    grid: LabelGrid
    made_from: str
    images: SharedImages

    @property
    def name(self) -> str:
        return f"{self.labels}: {self.file}"


@dataclass(frozen=True)
class Named:
    """What a teacher calls the validation images that could be scored.

    Attributes:
        class_ids: int64 [N].
        chosen: int64 [N], the class of the data whose output is largest.
        outputs: int64 [N], the largest of all outputs.
        not_finite: Images of which an output is NaN or infinite.
        refused: Images that could not be read.
        reasons: Why, in words.
    """

    class_ids: npt.NDArray[np.int64]
    chosen: npt.NDArray[np.int64]
    outputs: npt.NDArray[np.int64]
    not_finite: int
    refused: int
    reasons: str


def teacher_crop(path: str, protocol: ProtocolConfig) -> float:
    """The middle crop that a teacher is scored with: that of its own recipe for torchvision's, else the protocol's."""
    if not path.startswith(TORCHVISION):
        return protocol.val_crop
    import torchvision

    weights = torchvision.models.get_model_weights(path.removeprefix(TORCHVISION))["DEFAULT"]
    recipe = weights.transforms()
    crop, side = (v[0] if isinstance(v, (list, tuple)) else v for v in (recipe.crop_size, recipe.resize_size))
    return float(min(1.0, crop / side))


class Teacher:
    """Holds the teacher, and one image set at a time."""

    def __init__(self, run: Folder, config: RunConfig) -> None:
        from ddoq_ray.models.ensemble import load_teacher  # torch: only in the actor

        pin_threads(config.cluster.threads)
        self.device = device()
        self.model = load_teacher(config.teacher.paths, self.device, config.protocol.temperature)
        self.run_dir, self.config = run, config
        self._set: tuple[str, Any] | None = None

    def run(self, unit: LabelUnit) -> dict[str, int]:
        """Label one unit."""
        labeller = self._labeller(unit.codec)
        images = self._images_of(unit.labels, unit.images)
        stored = (images.shape[0], images.shape[2], images.shape[3])

        def answer(epoch: int, first: int, end: int) -> tuple[npt.NDArray[np.uint8], bytes]:
            return labeller.labels(images, np.arange(first, end), epoch)

        making = Making(unit.grid, unit.codec, unit.made_from, stored)
        size = write_labels(self.run_dir / unit.labels, unit.file, making, answer)
        return {"labels": unit.file.labels, "bytes": size}

    def _labeller(self, codec: str) -> Labeller:
        from ddoq_ray.models.labelling import Labeller
        from ddoq_ray.models.protocol_views import view_spec

        config = self.config
        spec = view_spec(config.protocol, config.student.image_size)
        return Labeller(self.model, codec, spec, seed=config.seed, batch=config.teacher.batch)

    def codec_costs(self, images: SharedImages) -> dict[str, dict[str, float]]:
        """`Labeller.codec_costs` on views of images that lie evenly in a set."""
        pixels = self._images_of("", images)
        index = np.unique(np.linspace(0, len(pixels) - 1, COST_VIEWS).astype(np.int64))
        return self._labeller("logits").codec_costs(pixels, index, self.config.protocol.temperature)

    def _images_of(self, name: str, images: SharedImages) -> Any:
        """uint8 [N, 3, H, W]: on the GPU where there is room, else the pages that all actors of the node share."""
        import torch

        if self._set is None or self._set[0] != name:
            self._set = None  # the old one goes first
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                pixels = torch.from_numpy(images.array())
            room = self.device == "cpu" or pixels.nbytes <= PART * torch.cuda.mem_get_info()[0]
            self._set = (name, pixels.to(self.device) if room else pixels)
        return self._set[1]

    def save_head(self, labels: str) -> None:
        """The linear head beside the features, so that a label can be decoded without the teacher."""
        import safetensors.torch

        from ddoq_ray.models.classifiers import Classifier

        assert isinstance(self.model, Classifier), "an ensemble has no head"
        head = {k: v.cpu().contiguous() for k, v in self.model.head.state_dict().items()}
        (self.run_dir / labels).publish(layout.HEAD, safetensors.torch.save(head))

    def name_images(self, validation: Validation, columns: tuple[int, ...]) -> Named:
        """What the real validation images are called; those that cannot be read are named in quarantine."""
        import torch

        from ddoq_ray.models.accuracy import logits_of

        refused = Refused()
        crop = teacher_crop(self.config.teacher.paths[0], self.config.protocol)
        outputs_of = torch.tensor(columns)
        class_ids: list[int] = []
        chosen, outputs, broken = [], [], 0
        images = scored_images(validation, self.model.image_size, crop, refused)
        for pixels, ids in in_batches(images, self.config.teacher.batch):
            logits = logits_of(self.model, torch.from_numpy(pixels)).cpu()
            broken += int((~logits.isfinite().all(1)).sum())
            chosen.append(logits[:, outputs_of].argmax(1).numpy())
            outputs.append(logits.argmax(1).numpy())
            class_ids += ids
        refused.publish(self.run_dir)
        empty = [np.empty(0, np.int64)]
        return Named(
            np.asarray(class_ids, np.int64),
            np.concatenate(chosen or empty),
            np.concatenate(outputs or empty),
            broken,
            refused.total,
            refused.reasons,
        )

    def judge_autoencoder(self, validation: Validation, columns: tuple[int, ...]) -> dict[str, Any]:
        """`fidelity.judge_autoencoder` on some of the real validation images, at the prior's resolution,
        by the first of several teachers."""
        from itertools import islice

        from ddoq_ray.models.autoencoder import load_autoencoder
        from ddoq_ray.models.ensemble import first_of
        from ddoq_ray.models.fidelity import judge_autoencoder
        from ddoq_ray.models.priors.load import load_prior

        config = self.config
        prior = load_prior(config.prior.given, device=self.device, **config.prior.loading)
        side, autoencoder = prior.image_size, prior.autoencoder
        if config.encoder.path is not None:
            autoencoder = load_autoencoder(config.encoder.path, device=self.device)
        some = sample_of(validation, max(LEAST, PIXELS[self.device] // side**2))
        pixels, ids = [], []
        for url, samples in zip(some.urls, some.samples, strict=True):
            one = Validation((url,), (samples,), some.num_classes, some.crop)
            for image, class_id in islice(scored_images(one, side, 1.0, Refused()), samples):
                pixels.append(image)
                ids.append(columns[class_id])
        return judge_autoencoder(autoencoder, first_of(self.model), np.stack(pixels), np.asarray(ids))

    def class_names(self) -> list[str] | None:
        """The names of the teacher's outputs, where it has them."""
        return self.model.classes


_actor = ray.remote(Teacher)


def spawner(config: RunConfig, run_dir: Folder) -> Callable[[], Any]:
    """What makes a teacher actor."""
    resources = config.cluster.teacher
    assert config.teacher.paths, "labels are made, and there is no teacher"

    def spawn() -> Any:
        return _actor.options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus).remote(run_dir, config)

    return spawn
