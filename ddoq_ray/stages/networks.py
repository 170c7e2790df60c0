"""What the driver must know of the networks, learnt in a worker so that the driver never holds one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.runtime import environment, pin_threads


@dataclass(frozen=True)
class Networks:
    """Facts of the prior and the teacher. The teacher's are None when no stage of the run needs it.

    Attributes:
        latent_shape: (C, h, w) of the prior's latents.
        image_size: Side of the images that the prior reads and makes, in pixels.
        encoder_id: Content digest of `encoder.path`'s autoencoder; empty when the prior's own encodes.
        noise_scales: (signal, sigma) of `quantizer.noise_level`; None at level 0.
        environment: Versions, threads and device kind of a worker: what the same bytes depend on.
    """

    prior_id: str
    latent_shape: tuple[int, ...]
    image_size: int
    prior_classes: tuple[str, ...] | None
    prior_labels: int
    teacher_id: str | None
    teacher_arch: str | None
    teacher_classes: tuple[str, ...] | None
    teacher_outputs: int
    feature_dim: int
    environment: dict[str, Any]
    encoder_id: str = ""
    noise_scales: tuple[float, float] | None = None


class Inquiry:
    """A worker is loading the networks to see what they are; the driver does other work until it asks."""

    def __init__(self, config: RunConfig, *, teacher: bool) -> None:
        teacher_path = config.teacher.path if teacher else None
        student = (config.student.arch, config.student.image_size) if teacher else None
        encoder = (config.encoder.path, config.encoder.posterior)
        noise = (config.quantizer.noise_level, config.synthesizer.steps)
        self._ref = _describe.remote(config.prior.path, encoder, noise, teacher_path, student, config.cluster.threads)

    def result(self) -> Networks:
        """Wait for the facts.

        Raises:
            ValueError: When a network's folder is missing, incomplete or does not fit together, or the student's name
                is unknown.
        """
        try:
            return ray.get(self._ref)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ValueError) else error) from None


@ray.remote(num_cpus=1)
def _describe(
    prior_path: str,
    encoder: tuple[str | None, str],
    noise: tuple[float, int],
    teacher_path: str | None,
    student: tuple[str, int] | None,
    threads: int,
) -> Networks:
    from ddoq_ray.models.autoencoder import load_autoencoder
    from ddoq_ray.models.classifiers import build_classifier, load_classifier
    from ddoq_ray.models.prior import load_prior

    pin_threads(threads)
    prior = load_prior(prior_path)
    autoencoder = load_autoencoder(encoder[0] or prior_path)
    autoencoder.check_posterior(encoder[1])
    channels, side = prior.latent_shape[0], prior.latent_shape[1]
    if (autoencoder.latent_channels, prior.image_size) != (channels, side * autoencoder.factor):
        raise ValueError(
            f"encoder.path={encoder[0]}: it makes {autoencoder.latent_channels} latent channels, "
            f"{autoencoder.factor} times smaller than the image; the prior's latents are {prior.latent_shape} of "
            f"{prior.image_size} px images. Give an autoencoder of the prior's latent space"
        )
    teacher = load_classifier(teacher_path) if teacher_path is not None else None
    if student is not None:
        build_classifier(student[0], 2, student[1])  # a name that no one knows must not show up hours later
    return Networks(
        prior_id=prior.id,
        latent_shape=tuple(prior.latent_shape),
        image_size=prior.image_size,
        prior_classes=tuple(prior.classes) if prior.classes else None,
        prior_labels=prior.num_classes,
        teacher_id=teacher.id if teacher else None,
        teacher_arch=teacher.arch if teacher else None,
        teacher_classes=tuple(teacher.classes) if teacher and teacher.classes else None,
        teacher_outputs=teacher.num_classes if teacher else 0,
        feature_dim=teacher.head.in_features if teacher else 0,
        environment=environment(threads),
        encoder_id=autoencoder.id if encoder[0] else "",
        noise_scales=prior.noise_scales(*noise) if noise[0] else None,
    )
