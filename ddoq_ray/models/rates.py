"""How many images a second a run's networks take on this machine's device, by what its workers call.

Pictures are random: a network's time does not depend on what it sees. Reading and writing files is not measured.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch

from ddoq_ray.config import RunConfig
from ddoq_ray.core.views.params import ViewSpec
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


def measured(config: RunConfig, device: str, seconds: float) -> Iterator[tuple[str, float, int]]:
    """(what, items a second, peak bytes): images of encode, decode, label and train; image-steps of denoise.

    The peak is that of the GPU's memory, with the weights of the network alone; 0 on a processor.

    Args:
        device: cpu or cuda.
        seconds: For each rate, about; at least one call is timed.

    Raises:
        ValueError: A network cannot be loaded, or refuses the settings.
    """
    torch.set_num_threads(config.cluster.threads)
    latent_shape, side = yield from _prior(config, device, seconds)
    _forget()  # each worker holds its own network only
    yield from _encoder(config, device, seconds, latent_shape, side)
    _forget()
    if config.teacher.paths:
        outputs = yield from _teacher(config, device, seconds)
        _forget()
        yield from _student(config, device, seconds, outputs)


Measured = Iterator[tuple[str, float, int]]


def _prior(
    config: RunConfig, device: str, seconds: float
) -> Generator[tuple[str, float, int], None, tuple[tuple[int, ...], int]]:
    """The prior's rates; its latent shape and the side of its images."""
    prior = load_prior(config.prior.given, device=device, **config.prior.loading, **config.synthesizer.loading)
    batch = config.synthesizer.batch
    z = torch.zeros(batch, *prior.latent_shape)
    decode, peak = _seconds(lambda: prior.decode(z.to(prior.device)), seconds)
    yield "decode", batch / decode, peak
    if (steps := steps_of(config, prior)) > 0:
        whole, peak = _seconds(lambda: _synthesized(config, prior, z), seconds)
        yield "denoise", batch * steps / max(whole - decode, 1e-6), peak
    return tuple(prior.latent_shape), prior.image_size


def _encoder(config: RunConfig, device: str, seconds: float, latent_shape: tuple[int, ...], side: int) -> Measured:
    own = config.encoder
    encoding = Encoding(latent_shape, own.batch or 16, one_shape=own.compile)
    how = {"dtype": own.dtype, "channels_last": own.channels_last, "compile": own.compile}
    encoder = LatentEncoder(load_autoencoder(own.path or config.prior.given, device=device, **how), encoding)
    pixels = np.random.default_rng(0).integers(0, 256, (encoding.batch, side, side, 3), np.uint8)
    keys = [str(i) for i in range(encoding.batch)]
    taken, peak = _seconds(lambda: encoder.encode(pixels, keys), seconds)
    yield "encode", encoding.batch / taken, peak


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


def _teacher(config: RunConfig, device: str, seconds: float) -> Generator[tuple[str, float, int], None, int]:
    """The first teacher, as it labels views; how many outputs it has."""
    teacher = load_classifier(config.teacher.paths[0], device)
    images, spec = _stored(config, config.teacher.batch, device)
    labeller = Labeller(teacher, "logits", spec, seed=0, batch=len(images))
    epochs = itertools.count()  # each view is rendered once, as in a run
    taken, peak = _seconds(lambda: labeller.labels(images, np.arange(len(images)), next(epochs)), seconds)
    yield "label", len(images) / taken, peak
    return teacher.num_classes


def _student(config: RunConfig, device: str, seconds: float, outputs: int) -> Measured:
    """A student that learns by stored labels."""
    how = config.cluster.trainer
    torch.set_num_threads(how.threads)
    images, spec = _stored(config, config.protocol.batch, device)
    student = build_student(config.student, outputs, 0).to(device).train()
    weights = torch.ones(len(images), device=device)
    training = StudentTraining(student, student, Resident(images), weights, config.protocol, spec, 0, 0, how=how)
    answers = torch.zeros(len(images), outputs, device=device)
    targets = StoredTargets(lambda rows: answers[torch.from_numpy(rows).to(device)])
    taken, peak = _seconds(lambda: training.train_epoch(config.protocol.lr, targets), seconds)
    yield "train", len(images) / taken, peak


def _stored(config: RunConfig, count: int, device: str) -> tuple[torch.Tensor, ViewSpec]:
    """Random stored images uint8 [count, 3, H, W], and the views that are cut from them."""
    size = config.student.image_size
    side = config.protocol.stored_side(size)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8).to(device)
    return images, view_spec(config.protocol, size)


def _seconds(call: Callable[[], Any], limit: float) -> tuple[float, int]:
    """Seconds that a call takes, the median of as many as fit the limit; and the GPU's memory at its highest."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
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
    return float(np.median(taken)), torch.cuda.max_memory_allocated() if gpu else 0


def _forget() -> None:
    """Give back what the networks before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
