"""How many images a second a run's networks take on this machine's device, by what its workers call.

Pictures are random: a network's time does not depend on what it sees. Reading and writing files is not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ddoq_ray.config import RunConfig
from ddoq_ray.models.autoencoder import load_autoencoder
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.encoding import Encoding, LatentEncoder
from ddoq_ray.models.labelling import Labeller
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.protocol_views import view_spec
from ddoq_ray.models.training.images import Resident
from ddoq_ray.models.training.student import StoredTargets, StudentTraining, build_student
from ddoq_ray.storage.records import ClassInfo

WARM_UP = 1  # calls that are not counted: they compile, and choose kernels


def measured(config: RunConfig, device: str, seconds: float) -> Iterator[tuple[str, float]]:
    """(what, items a second): images of encode, decode, label and train; image-steps of denoise.

    Args:
        device: cpu or cuda.
        seconds: For each rate, about; at least one call is timed.

    Raises:
        ValueError: A network cannot be loaded, or refuses the settings.
    """
    torch.set_num_threads(config.cluster.threads)
    prior = load_prior(config.prior.given, device=device, **config.prior.loading, **config.synthesizer.loading)
    side = prior.image_size
    own = config.encoder
    encoding = Encoding(prior.latent_shape, own.batch or 16, one_shape=own.compile)
    how = {"dtype": own.dtype, "channels_last": own.channels_last, "compile": own.compile}
    encoder = LatentEncoder(load_autoencoder(own.path or config.prior.given, device=device, **how), encoding)
    pixels = np.random.default_rng(0).integers(0, 256, (encoding.batch, side, side, 3), np.uint8)
    keys = [str(i) for i in range(encoding.batch)]
    yield "encode", encoding.batch / _seconds(lambda: encoder.encode(pixels, keys), seconds)

    batch = config.synthesizer.batch
    z = torch.zeros(batch, *prior.latent_shape)
    decode = _seconds(lambda: prior.decode(z.to(prior.device)), seconds)
    yield "decode", batch / decode
    if (steps := steps_of(config, prior)) > 0:
        whole = _seconds(lambda: _synthesized(config, prior, z), seconds)
        yield "denoise", batch * steps / max(whole - decode, 1e-6)

    yield from _students(config, device, seconds)


def steps_of(config: RunConfig, prior: Prior) -> int:
    """Steps of the diffusion that an image takes."""
    return prior.check_settings(_sampling(config, prior))


def _sampling(config: RunConfig, prior: Prior) -> Sampling:
    own = config.synthesizer
    return Sampling(
        own.strength,
        own.steps,
        own.start,
        prior.guidance_of(own.guidance),
        own.guide_until,
        own.guide_scale,
        own.guide_pool,
    )


def _synthesized(config: RunConfig, prior: Prior, z: torch.Tensor) -> torch.Tensor:
    some = [ClassInfo(0, "cat", "a cat", 0, 0)] * len(z)
    generators = [torch.Generator(prior.device).manual_seed(i) for i in range(len(z))]
    noise = torch.randn(z.shape)
    return prior.synthesize(z, prior.conditioning(some), noise, _sampling(config, prior), generators)


def _students(config: RunConfig, device: str, seconds: float) -> Iterator[tuple[str, float]]:
    """The teacher that labels views, and a student that learns by them."""
    if not config.teacher.paths:
        return
    teacher = load_classifier(config.teacher.paths[0], device)
    size = config.student.image_size
    spec, batch = view_spec(config.protocol, size), config.teacher.batch
    side = config.protocol.stored_side(size)
    shape = (max(batch, config.protocol.batch), 3, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    labeller = Labeller(teacher, "logits", spec, seed=0, batch=batch)
    yield "label", batch / _seconds(lambda: labeller.labels(images, np.arange(batch), 0), seconds)

    torch.set_num_threads(config.cluster.trainer.threads)
    student = build_student(config.student, teacher.num_classes, 0).to(device).train()
    weights = torch.ones(len(images), device=device)
    how = config.cluster.trainer
    training = StudentTraining(student, student, Resident(images), weights, config.protocol, spec, 0, 0, how=how)
    answers = torch.zeros(len(images), teacher.num_classes, device=device)
    targets = StoredTargets(lambda rows: answers[torch.from_numpy(rows).to(device)])
    yield "train", len(images) / _seconds(lambda: training.train_epoch(config.protocol.lr, targets), seconds)


def _seconds(call: Callable[[], Any], limit: float) -> float:
    """Seconds that a call takes: the median of as many as fit the limit."""
    for _ in range(WARM_UP):
        call()
    _wait()
    taken: list[float] = []
    start = time.monotonic()
    while not taken or (time.monotonic() - start < limit and len(taken) < 100):
        before = time.monotonic()
        call()
        _wait()
        taken.append(time.monotonic() - before)
    return float(np.median(taken))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
