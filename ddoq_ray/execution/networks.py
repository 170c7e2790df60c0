"""What the driver must know of the networks, learnt in a child process so that the driver never holds one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import MEASURED
from ddoq_ray.config.synthesizer import SynthesizerConfig
from ddoq_ray.execution.known_networks import PACKAGE, keep, kept, place_of

# The keys of `synthesizer` that a prior may refuse.
SAMPLING = ("start", "strength", "steps", "guidance", "guide_until", "guide_scale", "guide_pool")


@dataclass(frozen=True)
class Networks:
    """Facts of the prior and the teacher. The teacher's are None when no stage of the run needs it.

    Attributes:
        latent_shape: (C, h, w) of the prior's latents.
        image_size: Side of the images that the prior reads and makes, in pixels.
        encoder_id: Content digest of `encoder.path`'s autoencoder; empty when the prior's own encodes.
        latents_of: The prior whose latents the prior's latents are, where it is a copy with another decoder.
        feature_dim: Of the teacher's penultimate features; None for an ensemble, which has no linear head.
        judge_id: Content digest of the classifier that chooses among candidates; None where nothing is chosen.
        prior_needs: The fields of a class without which the prior cannot be asked for it.
        noise_scales: (signal, sigma) of `quantizer.noise_level`; None at level 0.
        student_takes_one: Whether the student trains on a batch of one image, which batch norm refuses.
        student_bytes: Of the student's weights, in its published form.
        scorer_id: Content digest of the first teacher, by which methods choose or make images.
        scorer_norms: How many batch norms it has.
        scorer_side: Side of the images that it sees, in pixels.
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
    feature_dim: int | None
    environment: dict[str, Any]
    encoder_id: str = ""
    judge_id: str | None = None
    latents_of: str | None = None
    prior_needs: tuple[str, ...] = ("prior_label",)
    noise_scales: tuple[float, float] | None = None
    student_takes_one: bool = True
    student_bytes: int = 0
    scorer_id: str | None = None
    scorer_norms: int = 0
    scorer_side: int = 0

    @property
    def latents_id(self) -> str:
        """What the latents follow from, of the prior."""
        return self.latents_of or self.prior_id


class Inspection:
    """A process of its own loads the networks, to see what they are and whether the settings can work on them."""

    def __init__(self, config: RunConfig, *, teacher: bool) -> None:
        """What is to be found out; nothing is started yet.

        Args:
            teacher: Whether a stage of the run needs the teacher and the student.
        """
        wanted, s = set(config.stages), config.synthesizer
        size = config.student.image_size
        judge = (
            s.judge or next(iter(config.teacher.paths), None) if "synthesize" in wanted and s.candidates > 1 else None
        )
        question = {
            "threads": config.cluster.threads,
            "prior": {"path": config.prior.path} | config.prior.loading,
            "encoder": {
                "path": config.encoder.path,
                "posterior": config.encoder.posterior,
                "tried": "encode" in wanted and not config.latents.path,
            },
            "noise": [config.quantizer.noise_level, s.steps],
            "synthesizer": {key: getattr(s, key) for key in SAMPLING} if "synthesize" in wanted else None,
            "methods": {
                name: {key: getattr(made, key) for key in SAMPLING}
                for name, made in _other_ways(config).items()
                if "synthesize" in wanted
            },
            "judge": judge,
            "teacher": config.teacher.paths if teacher else None,
            "student": {"arch": config.student.arch, "image_size": size} if teacher else None,
        }
        self._threads = config.cluster.threads
        self._question = json.dumps(question)
        taught = config.teacher.paths if teacher else ()
        self._networks = [path for path in (config.prior.path, config.encoder.path, *taught, judge) if path]
        self._place: Path | None = None
        self._facts: dict[str, Any] | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin to look, unless it is known; the caller does other work until it asks."""
        if self._process is None and self._facts is None:
            self._place = place_of(self._question, self._networks)
            self._facts = kept(self._place) if self._place else _ANSWERS.get(self._question)
            if self._facts is None:
                self._process = _ask(self._question, self._threads)

    def result(self) -> Networks:
        """Wait for the facts; a look that was not started starts now.

        Raises:
            ValueError: When a network's folder is missing, incomplete or does not fit together, when a setting cannot
                work on the networks, or when there is too little memory to load them.
            RuntimeError: When the process ended in a way of its own; its last words are in the message.
        """
        self.start()
        if self._facts is None:
            assert self._process is not None
            process, self._process = self._process, None
            self._facts = self._answer(process)
            _ANSWERS[self._question] = self._facts
            keep(self._place, self._facts)
        tuples = ("latent_shape", "prior_classes", "prior_needs", "teacher_classes", "noise_scales")
        facts: dict[str, Any] = {k: tuple(v) if k in tuples and v is not None else v for k, v in self._facts.items()}
        return Networks(**facts)

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
        code = process.returncode
        if code == -signal.SIGKILL:
            raise ValueError(
                "the process that loads the networks before the run was killed, as systems do when memory runs out; "
                "the prior, the autoencoder and the teacher must fit into this machine's memory together"
            )
        if code != 0 and any(words in err for words in _NO_MEMORY):
            raise ValueError(
                "the process that loads the networks before the run could not have the memory it asked for "
                f"({err.strip().splitlines()[-1][:200]}); raise the limit on this shell's memory (ulimit -v), or take "
                "a machine with more"
            )
        if code != 0:
            raise RuntimeError(f"the process that looks at the networks ended with code {code}:\n{err.strip()}")
        answer = json.loads(out.strip().splitlines()[-1])
        if "refused" in answer:
            raise ValueError(answer["refused"])
        facts = answer["facts"]
        told = facts["environment"]
        # In the order that manifests have always had.
        facts["environment"] = {
            **{k: told[k] for k in ("torch", "diffusers", "numpy")},
            "ray": ray.__version__,
            **{k: told[k] for k in ("threads", "cpu", "device")},
        }
        return dict(facts)


# What Python, the loader of shared libraries and the system say where a limit on memory is reached.
_NO_MEMORY = ("MemoryError", "failed to map segment", "Cannot allocate memory", "can't allocate memory")
_ANSWERS: dict[str, dict[str, Any]] = {}  # of this process, on networks of which none is kept: a notebook asks twice


def _ask(question: str, threads: int) -> subprocess.Popen[str]:
    """A process that is at work on the answer."""
    here = {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])}
    process = subprocess.Popen(
        [sys.executable, "-m", "ddoq_ray.models.inspect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | here | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.stdin is not None
    process.stdin.write(question)
    process.stdin.flush()
    return process


def _other_ways(config: RunConfig) -> dict[str, SynthesizerConfig]:
    """Method -> how it is synthesized, where that is not the run's own way."""
    return {spec.name: spec.synthesizer(config.synthesizer) for spec in config.specs if spec.synthesizer is not None}


def asks_teacher(config: RunConfig) -> bool:
    """Whether a stage of the run needs the teacher: to measure students, or to choose or make a method's images."""
    wanted = set(config.stages)
    return bool(wanted & MEASURED) or ("synthesize" in wanted and bool(config.methods_of("teacher")))


def check_methods(config: RunConfig, networks: Networks) -> None:
    """Refuse methods that the networks cannot carry out.

    Raises:
        ValueError: Images are to be recovered from batch norms that the teacher does not have.
    """
    recovered = [spec.name for spec in config.specs if spec.images == "recover"]
    if "synthesize" in config.stages and recovered and not networks.scorer_norms:
        raise ValueError(
            f"{', '.join(recovered)} recover images from the statistics of the teacher's batch norms, and "
            f"{config.teacher.paths[0]} has none; give a teacher.path with batch norm (a ResNet, such as "
            "`ddoq-ray train-teacher` makes of arch=resnet18-small), or leave them out of baselines"
        )


def check_side(config: RunConfig, networks: Networks) -> None:
    """Refuse to store images larger than they are made.

    Raises:
        ValueError: With both sizes.
    """
    side = config.synthesizer.image_size
    if "synthesize" in config.stages and side is not None and side > networks.image_size:
        raise ValueError(
            f"synthesizer.image_size={side}: the prior makes images of {networks.image_size} px, and enlarged ones "
            "hold nothing more. Leave the key out; where the prior's folder does not fix it, prior.image_size does"
        )


def check_batches(sizes: Mapping[str, int], config: RunConfig, networks: Networks) -> None:
    """Refuse batches of a single image where the student's batch norm needs two.

    However many ranks share a batch, `ranks.share` leaves none a single image of it, unless it holds only one.

    Args:
        sizes: Image sets by name, with their numbers of images.

    Raises:
        ValueError: Naming the set, its last batch and a batch that works.
    """
    if networks.student_takes_one:
        return

    def smallest(images: int, batch: int) -> int:
        return min(batch, images, images % batch or batch)

    for name, images in sizes.items():
        if images and smallest(images, config.protocol.batch) < 2:
            now = config.protocol.batch  # outwards from it: `full` may have millions of images
            beside = (b for d in range(max(now, images)) for b in (now - d, now + d) if 2 <= b <= images)
            near = next((b for b in beside if smallest(images, b) >= 2), None)
            raise ValueError(
                f"protocol.batch={config.protocol.batch} leaves a batch with less than two images of {name} "
                f"({images:,}), and student.arch={config.student.arch} has batch norm, which needs two; "
                + (f"use protocol.batch={near}" if near else "use a student without it, such as convnet3")
            )
