"""The configuration of a comparison: that of a run, with several values of what is compared."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, ClassVar

import yaml

from ddoq_ray.config.methods import METHODS, SPECS, MethodSpec
from ddoq_ray.config.models import TeacherConfig
from ddoq_ray.config.paths import plain_path
from ddoq_ray.config.presets import choices, config_dir
from ddoq_ray.config.run import RunConfig
from ddoq_ray.config.schema import from_mapping, option, require
from ddoq_ray.config.training import StudentConfig

HARD = "-hard"  # behind the protocol's name, where students learn the images' classes


@dataclass(frozen=True)
class PartConfig(RunConfig):
    """A part of a comparison: a run at one IPC, with one student, teacher and kind of labels.

    Its methods are those that are listed, of which none is its own: all lie side by side.
    """

    compared: ClassVar[bool] = True

    methods: tuple[str, ...] = option(
        ("ddoq", "ddoq-sqrt", "d4m", "random"), "methods to compare: " + ", ".join(METHODS)
    )
    baselines: tuple[str, ...] = option((), "of a run only: here `methods` lists what is compared")

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        require(not unknown and bool(self.methods), f"methods={unknown}: expected some of {', '.join(METHODS)}")
        twice = sorted({m for m in self.methods if self.methods.count(m) > 1})
        require(not twice, f"methods names {', '.join(twice)} twice")
        super().__post_init__()

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The methods of this part, and the set of `images.path`."""
        return (*(SPECS[name] for name in self.methods), *self.given)

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.dataset.title}-compare"


@dataclass(frozen=True)
class CompareConfig(PartConfig):
    """What `ddoq-ray compare` is given."""

    ipcs: tuple[int, ...] = option((1, 10), "images per class, each of which is compared")
    batches: tuple[int, ...] = option((), "protocol.batch of each of ipcs, in order; none: protocol.batch for all")
    students: tuple[str, ...] = option(
        (), "students, each a preset or an architecture, NAME@SIDE at another size; none: the one of student."
    )
    teachers: tuple[str, ...] = option((), "teachers, each a preset or a path; none: the one of teacher.")
    hard_labels: bool = option(
        False, "students of the images' classes (hard labels) beside those of soft labels, for hard-label recovery"
    )
    reference: str = option("random", "the method from which all others' differences are taken, seed by seed")
    reported: str | None = option(
        None, "dataset whose published figures stand beside (cifar10, cifar100, imagenet-1k, ...); null: its own name"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.ipcs) and all(k >= 1 for k in self.ipcs) and len(set(self.ipcs)) == len(self.ipcs),
            f"ipcs={list(self.ipcs)}: expected numbers of images per class, 1 or more, each once",
        )
        require(
            not self.batches or len(self.batches) == len(self.ipcs),
            f"batches={list(self.batches)}: expected one for each of ipcs={list(self.ipcs)}, or none",
        )
        require(
            self.reference in METHODS,
            f"reference={self.reference}: expected one of {', '.join(METHODS)}",
        )
        require(
            not (self.hard_labels and self.labels.mode == "hard"),
            "hard_labels=true with labels.mode=hard: all students would learn hard labels twice; leave one of them out",
        )
        for what, names in (("students", self.students), ("teachers", self.teachers)):
            twice = sorted({name for name in names if names.count(name) > 1})
            require(not twice, f"{what} names {', '.join(twice)} twice")
        titles = [teacher.title for teacher in _teachers(self)]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        require(
            not twice,
            f"teachers={list(self.teachers)}: two are called {', '.join(twice)}, the last part of their paths, which "
            "names their labels and students; rename a folder",
        )
        _students(self)

    @property
    def reported_as(self) -> str:
        """The name under which published figures are looked up."""
        return self.reported or self.dataset.title

    def parts(self) -> list[PartConfig]:
        """A run for each IPC, student, teacher and kind of labels; students of one IPC follow one another.

        `full` does not depend on the IPC: only the parts of the largest one have it.
        """
        batches = self.batches or (self.protocol.batch,) * len(self.ipcs)
        kinds = (False, True) if self.hard_labels else (False,)
        shared = {f.name: getattr(self, f.name) for f in fields(PartConfig)}
        found = []
        for (ipc, batch), student, teacher, hard in product(
            zip(self.ipcs, batches, strict=True), _students(self), _teachers(self), kinds
        ):
            if hard and teacher != _teachers(self)[0]:
                continue  # no teacher has a part in hard labels
            methods = tuple(m for m in self.methods if m != "full" or ipc == max(self.ipcs))
            changed: dict[str, Any] = {
                "ipc": ipc,
                "student": student,
                "teacher": teacher,
                "methods": methods,
                "protocol": replace(self.protocol, batch=batch),
            }
            if hard:
                changed["labels"] = replace(self.labels, mode="hard")
                changed["protocol"] = replace(changed["protocol"], name=self.protocol.name + HARD)
            if methods:
                found.append(PartConfig(**shared | changed))
        return found


def _students(config: CompareConfig) -> list[StudentConfig]:
    return [_student(config, name) for name in config.students] or [config.student]


def _student(config: CompareConfig, name: str) -> StudentConfig:
    arch, at, side = name.partition("@")
    require(not at or side.isdecimal(), f"students: {name} is no NAME@SIDE, such as convnet3@16")
    chosen = _preset("student", arch)
    found = replace(config.student, arch=arch) if chosen is None else from_mapping(StudentConfig, chosen, "student.")
    return replace(found, image_size=int(side)) if at else found


def _teachers(config: CompareConfig) -> list[TeacherConfig]:
    found = []
    for name in config.teachers:
        chosen = _preset("teacher", name)
        path = plain_path(name) if chosen is None else chosen.get("path", TeacherConfig.path)
        found.append(replace(config.teacher, path=path))
    return found or [config.teacher]


def _preset(group: str, name: str) -> dict[str, Any] | None:
    """What the choice of that name sets; None where the group has none."""
    if name not in choices(group):
        return None
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text()) or {}
