"""What a run compares: its methods with their places, and its cells, each of which is one trained student."""

from __future__ import annotations

from dataclasses import dataclass

from ddoq_ray.config import RunConfig
from ddoq_ray.config.methods import MethodSpec, own_method
from ddoq_ray.storage.layout import LabelKey, Place, word


@dataclass(frozen=True)
class Method:
    """A method of the comparison, and where its parts are.

    Attributes:
        spec: What it is.
        at: Where its students are.
        sets: Places with an image set each, one a seed or one for all; none when it trains on the real data.
    """

    spec: MethodSpec
    at: Place
    sets: tuple[Place, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def codebook(self) -> Place | None:
        """Where its codebook is; None when it has none."""
        return self.sets[0] if self.spec.quantizer is not None else None


def own_set(config: RunConfig) -> Place:
    """Where the codebook and the images of the run's own quantizer are; in a comparison, beside the others'."""
    return Place.of_method(own_method("counts"), config.ipc) if config.compared else Place()


def methods(config: RunConfig) -> list[Method]:
    """The run's own method, first, and its baselines; of a comparison, its methods."""
    found = []
    for spec in config.specs:
        name = spec.name
        own = name == config.own_method and not config.compared
        at = Place() if own else Place.of_method(name, config.ipc)
        if spec.images == "data":
            sets: tuple[Place, ...] = ()
        elif spec.own:
            sets = (own_set(config),)
        else:
            sets = tuple(at.draw(k) for k in range(config.num_seeds)) if spec.draws else (at,)
        found.append(Method(spec, at, sets))
    return found


def label_key(config: RunConfig) -> LabelKey:
    """What soft labels of any image set are known by in this run."""
    return LabelKey(config.teacher.title, config.protocol.name, config.student.image_size)


@dataclass(frozen=True)
class Cell:
    """One student to train: a line of the report.

    Attributes:
        method: The word of the report's row.
        ipc: Images a class.
        student: Architecture.
        size: Side of what the student sees, in pixels.
        teacher: The teacher's title.
        protocol: The protocol's name.
        seed: The student's own seed (initialization and order).
        images: Folder of its image set, relative to the run directory; None for all the real images.
        labels: Folder of its soft labels; None when the teacher labels while training.
        scheme: Weight scheme of the images in its loss.
        at: Where its method's students are.
    """

    method: str
    ipc: int
    student: str
    size: int
    teacher: str
    protocol: str
    seed: int
    images: str | None
    labels: str | None
    scheme: str
    at: Place

    @property
    def folder(self) -> str:
        """Where the student is, relative to the run directory."""
        key = LabelKey(self.teacher, self.protocol, self.size).name
        return self.at.student(f"{word(self.student)}-{key}-seed{self.seed}")


def cells(config: RunConfig) -> list[Cell]:
    """Every student of the run, those of one image set next to each other."""
    key = label_key(config)
    found = []
    for method in methods(config):
        for seed in range(config.num_seeds):
            place = method.sets[seed if len(method.sets) > 1 else 0] if method.sets else None
            stored = place is not None and config.labels.stored
            found.append(
                Cell(
                    method=method.name,
                    ipc=config.ipc,
                    student=config.student.arch,
                    size=config.student.image_size,
                    teacher=key.teacher,
                    protocol=key.protocol,
                    seed=seed,
                    images=place.images if place is not None else None,
                    labels=place.labels(key) if place is not None and stored else None,
                    scheme=method.spec.scheme,
                    at=method.at,
                )
            )
    return found
