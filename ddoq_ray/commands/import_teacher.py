"""``ddoq-ray import-teacher``: a classifier that others trained, as a folder that `teacher.path` takes."""

from __future__ import annotations

from ddoq_ray.config.importing import ImportTeacherConfig
from ddoq_ray.data.samples import read_classes
from ddoq_ray.execution.places import check_lasting
from ddoq_ray.execution.workers import say
from ddoq_ray.models.classifiers import save_classifier
from ddoq_ray.models.folders import check_free
from ddoq_ray.models.importing import import_classifier


def main(command: ImportTeacherConfig) -> None:
    """Convert and save a teacher.

    Raises:
        ValueError: No weights, or none that fit; a folder in the way.
    """
    if command.source is None:
        raise ValueError(
            "import-teacher: source= is missing: a file or folder of tensors, or torchvision:NAME, such as "
            "source=resnet20.safetensors arch=resnet20-cifar image_size=32"
        )
    check_lasting(command.out, "out")
    check_free(command.out, overwrite=command.overwrite)
    names = None if command.classes is None else [c.name for c in read_classes(command.classes)]
    model = import_classifier(command, names)
    save_classifier(
        model, command.out, extra={"origin": command.source}, dtype=command.dtype, overwrite=command.overwrite
    )
    say(f"import-teacher {command.out}: {model.arch} of {model.num_classes} outputs at {model.image_size} px")
