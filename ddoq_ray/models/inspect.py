"""What a run must know of its networks, and whether its settings can work on them, found in a process of its own.

The process reads a question as JSON and answers with the last line it prints. It ends when it has answered, so that
whoever asks never holds a network, and it sees no GPU: nothing here is worth the start of one.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import nn

from ddoq_ray.models.autoencoder import Autoencoder, load_autoencoder
from ddoq_ray.models.classifiers import Classifier, build_classifier, check_answers, load_classifier
from ddoq_ray.models.ensemble import Teacher, feature_dim, first_of, load_teacher
from ddoq_ray.models.folders import first_line
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.provenance import environment


def describe(question: dict[str, Any]) -> dict[str, Any]:
    """The facts of the networks that `execution.networks.Networks` lists.

    Args:
        question: paths and settings; see `execution.networks.Inspection`. A part that is None is not looked at.

    Raises:
        ValueError: a network does not load, the parts do not fit, or a setting cannot work on them.
    """
    threads = question["threads"]
    torch.set_num_threads(threads)
    prior = load_prior(**question["prior"])
    encoder = question["encoder"]
    autoencoder = load_autoencoder(encoder["path"] or question["prior"]["path"])
    check_encoder(prior, autoencoder, encoder)
    if question["synthesizer"] is not None:
        check_synthesizer(prior, question["synthesizer"])
    for method, settings in question.get("methods", {}).items():
        try:
            check_synthesizer(prior, settings)
        except ValueError as error:
            raise ValueError(f"baselines={method}: {error}") from error
    teacher = None
    if question["teacher"] is not None:
        teacher = load_teacher(question["teacher"])
        check_teacher(teacher)
    judge = None
    if question["judge"] is not None:
        judge = load_classifier(question["judge"])
        check_judge(judge, teacher)
    takes_one, student_bytes = True, 0
    if question["student"] is not None:
        takes_one, student_bytes = check_student(**question["student"], outputs=teacher.num_classes if teacher else 2)
    noise = question["noise"]
    return {
        "prior_id": prior.id,
        "latent_shape": list(prior.latent_shape),
        "image_size": prior.image_size,
        "prior_classes": prior.classes or None,
        "prior_labels": prior.num_classes,
        "prior_needs": list(prior.needs),
        "teacher_id": teacher.id if teacher else None,
        "teacher_arch": teacher.arch if teacher else None,
        "teacher_classes": (teacher.classes or None) if teacher else None,
        "teacher_outputs": teacher.num_classes if teacher else 0,
        "feature_dim": feature_dim(teacher) if teacher else 0,
        "encoder_id": autoencoder.id if encoder["path"] else "",
        "judge_id": judge.id if judge else None,
        "latents_of": prior.latents_id if prior.latents_id != prior.id else None,
        "noise_scales": list(prior.noise_scales(*noise)) if noise[0] else None,
        "student_takes_one": takes_one,
        "student_bytes": student_bytes,
        "scorer_id": first_of(teacher).id if teacher else None,
        "scorer_norms": sum(isinstance(m, nn.BatchNorm2d) for m in first_of(teacher).modules()) if teacher else 0,
        "scorer_side": first_of(teacher).image_size if teacher else 0,
        "environment": environment(threads),
    }


def check_encoder(prior: Prior, autoencoder: Autoencoder, encoder: dict[str, Any]) -> None:
    """Whether the autoencoder makes the prior's latents, on one grey image where the run encodes."""
    autoencoder.check_posterior(encoder["posterior"])
    channels, side = prior.latent_shape[0], prior.latent_shape[1]
    if (autoencoder.latent_channels, prior.image_size) != (channels, side * autoencoder.factor):
        raise ValueError(
            f"encoder.path={encoder['path']}: it makes {autoencoder.latent_channels} latent channels, "
            f"{autoencoder.factor} times smaller than the image; the prior's latents are {prior.latent_shape} of "
            f"{prior.image_size} px images. Give an autoencoder of the prior's latent space"
        )
    if encoder["tried"]:
        z = autoencoder.encode(torch.zeros(1, 3, prior.image_size, prior.image_size))
        if tuple(z.shape[1:]) != tuple(prior.latent_shape) or not bool(torch.isfinite(z).all()):
            raise ValueError(
                f"the autoencoder turns a grey image into latents {tuple(z.shape[1:])} "
                f"{'with' if not bool(torch.isfinite(z).all()) else 'without'} NaN or infinite values; expected finite "
                f"ones of {tuple(prior.latent_shape)}: check encoder.path and prior.path"
            )


def check_synthesizer(prior: Prior, settings: dict[str, Any]) -> None:
    """Whether the prior can run these settings, in the words of their keys."""
    settings = settings | {"guidance": prior.guidance_of(settings["guidance"])}
    try:
        prior.check_settings(Sampling(**settings))
    except ValueError as error:
        given = ", ".join(f"synthesizer.{key}={value}" for key, value in settings.items())
        raise ValueError(f"{error} ({given})") from error


def check_judge(judge: Classifier, teacher: Teacher | None) -> None:
    """Whether the classifier that chooses among candidates knows the classes by the teacher's outputs."""
    if teacher is None:
        return
    same = judge.num_classes == teacher.num_classes
    if same and judge.classes is not None and teacher.classes is not None:
        same = judge.classes == teacher.classes
    if not same:
        raise ValueError(
            f"synthesizer.judge has {judge.num_classes} outputs ({', '.join((judge.classes or ['unnamed'])[:3])}, ...) "
            f"and the teacher {teacher.num_classes} ({', '.join((teacher.classes or ['unnamed'])[:3])}, ...); give a "
            "judge of the same classes in the same order"
        )


def check_teacher(teacher: Teacher) -> None:
    """Whether the teacher answers an image of its size."""
    try:
        check_answers(teacher, teacher.arch, teacher.image_size)
    except ValueError as error:
        raise ValueError(f"the teacher {error}; check teacher.path") from error


def check_student(arch: str, image_size: int, outputs: int = 2) -> tuple[bool, int]:
    """Run one step's forward and backward of the student.

    Returns:
        Whether it trains on a batch of one image as well, and the bytes of its weights.

    Raises:
        ValueError: its name is unknown, or it does not fit its image size.
    """
    student = build_classifier(arch, outputs, image_size).train()
    nbytes = sum(tensor.nbytes for tensor in student.state_dict().values())
    try:
        _step(student, 2, image_size)
    except Exception as error:  # a network may be the user's own
        raise ValueError(
            f"student.arch={arch} does not take images of student.image_size={image_size} ({first_line(error)}); "
            "choose the size that it is made for (224 for most of torchvision's), or a student for small images such "
            "as resnet18-small or convnet3"
        ) from error
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules()):
        return True, nbytes
    try:
        _step(student, 1, image_size)
    except ValueError:  # batch norm over one value
        return False, nbytes
    return True, nbytes


def _step(student: Classifier, images: int, size: int) -> None:
    logits = student(torch.full((images, 3, size, size), 0.5))
    if logits.shape != (images, student.num_classes):
        raise ValueError(f"it gives {tuple(logits.shape)} for {images} images")
    logits.sum().backward()


def main() -> None:
    """Answer the question on standard input."""
    try:
        answer: dict[str, Any] = {"facts": describe(json.load(sys.stdin))}
    except ValueError as error:
        answer = {"refused": str(error)}
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # the libraries' own ends touch a fifth more memory, for nothing
