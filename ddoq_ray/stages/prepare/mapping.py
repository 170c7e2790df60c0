"""Which output of the prior and of the teacher each class is: as given, else by name, never by position."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ddoq_ray.execution.networks import Networks
from ddoq_ray.execution.workers import say
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.prepared import Data
from ddoq_ray.storage.records import ClassInfo

_BREAKS = re.compile(r"[\s_-]+")


def resolve(data: Data, networks: Networks, *, required: bool = True) -> Data:
    """Find each class's place in the prior (where it takes labels) and, when the run needs it, the teacher.

    Publishes ``classes.json``.

    Args:
        required: False where no later stage of this run needs the places: data can be prepared for a prior that is yet
            to be trained.

    Raises:
        ValueError: When a network does not cover the classes, and they are required.
    """
    classes: Sequence[ClassInfo] = data.classes
    if "prior_label" in networks.prior_needs:
        for line in contradictions(classes, "prior_label", "prior", networks.prior_classes):
            say(line)
        try:
            classes = resolve_mapping(classes, "prior_label", "prior", networks.prior_classes, networks.prior_labels)
        except ValueError as error:
            if required:
                raise
            say(f"prepare    the classes have no place in the prior yet, which stages after prepare need: {error}")
            return data
    if networks.teacher_id is not None:
        names = networks.teacher_classes
        for line in contradictions(classes, "teacher_index", "teacher", names):
            say(line)
        classes = resolve_mapping(classes, "teacher_index", "teacher", names, networks.teacher_outputs)
    if networks.teacher_id is not None or not (data.run / layout.DATA).exists(layout.CLASSES):
        prepared = data.run / layout.DATA
        prepared.publish_json(layout.CLASSES, [c.to_json() for c in classes])
        Artifact(prepared, "prepare").amend(layout.CLASSES)
    return dataclasses.replace(data, classes=tuple(classes))


class Outputs:
    """A network's outputs by their names: the whole name, the same in plain letters, and each of its synonyms."""

    def __init__(self, names: Sequence[str] | None) -> None:
        """Index the names once: there may be 21,000."""
        self.names = list(names or [])
        self._levels: list[tuple[Callable[[str], Iterable[str]], dict[str, list[int]]]] = []
        for keys in (_whole, _plain, _synonyms):
            places: dict[str, list[int]] = {}
            for i, name in enumerate(self.names):
                for key in keys(name):
                    places.setdefault(key, []).append(i)
            self._levels.append((keys, places))

    def find(self, info: ClassInfo) -> list[int]:
        """The outputs that bear a class's name, else its prompt; the most literal kind of match that finds any."""
        for keys, places in self._levels:
            for text in (info.name, info.prompt):
                found = sorted({i for key in keys(text) for i in places.get(key, [])})
                if found:
                    return found
        return []


def _whole(name: str) -> list[str]:
    return [name.strip().lower()]


def _plain(name: str) -> list[str]:
    """Case, underscores, hyphens and spaces are spelling: golden_retriever is Golden retriever."""
    words = [_BREAKS.sub(" ", part).strip().casefold() for part in name.split(",")]
    return [", ".join(words)]


def _synonyms(name: str) -> set[str]:
    """Each of "tench, Tinca tinca"; WordNet ids among them are names like any other."""
    return {word for part in name.split(",") if (word := _BREAKS.sub(" ", part).strip().casefold())}


def resolve_mapping(
    classes: Sequence[ClassInfo], field: str, network: str, names: Sequence[str] | None, num_outputs: int
) -> list[ClassInfo]:
    """Fill `teacher_index` or `prior_label` of each class: as given, else by the class's name, never by position.

    A name is matched whole first, then without regard to case, underscores, hyphens and spaces, then by any of the
    names that commas separate.

    Raises:
        ValueError: When an index is outside the network's outputs, when a class cannot be found by name, or when
            two classes share an output. A wrong mapping here is the field's most common silent mistake.
    """
    outputs = Outputs(names)
    filled = []
    for info in classes:
        index = getattr(info, field)
        if index is None:
            index = _only(info, field, network, outputs)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_outputs:
            raise ValueError(
                f"class {info.class_id} ({info.name}) has {field}={index}, but the {network} has outputs 0 to "
                f"{num_outputs - 1}; mend classes.json or choose another {network}"
            )
        place: dict[str, Any] = {field: index}
        filled.append(dataclasses.replace(info, **place))
    used = Counter(getattr(c, field) for c in filled)
    twice = [i for i, n in used.items() if n > 1]
    if twice:
        names_of = [c.name for c in filled if getattr(c, field) == twice[0]]
        raise ValueError(f"classes {', '.join(names_of)} share {field}={twice[0]}; each class needs its own")
    return filled


def _only(info: ClassInfo, field: str, network: str, outputs: Outputs) -> int:
    found, names = outputs.find(info), outputs.names
    if len(found) > 1:  # ImageNet has two cranes
        which = ", ".join(f"{i} ({names[i]})" for i in found[:4])
        plain = ", ".join(map(str, found[:12]))
        raise ValueError(
            f"class {info.class_id} ({info.name}): the {network} has {len(found)} outputs of that name "
            f"({plain}): {which}; give {field} for it in classes.json"
        )
    if not found:
        known = f"it knows {', '.join(names[:12])}" if names else "it has no class names"
        raise ValueError(
            f"class {info.class_id} ({info.name}) has no {field}, and the {network} has no output of that name "
            f"({known}{', ...' if len(names) > 12 else ''}); give {field} for each class in "
            f"classes.json, or a {network} that knows these classes{_serves(network, names)}"
        )
    return found[0]


def _serves(network: str, names: Sequence[str]) -> str:
    """What to take for classes that a prior has no labels of."""
    if network != "prior":
        return ""
    imagenet = len(names) == 1000 and "tench" in _synonyms(names[0])
    own = ": this one's labels are ImageNet-1K's, which serve that list and its subsets" if imagenet else ""
    return (
        f"{own}. For other classes `ddoq-ray train-prior` makes a prior of the images themselves, and Stable Diffusion "
        "is asked by a class's name (prior=sd-1-5)"
    )


def contradictions(classes: Sequence[ClassInfo], field: str, network: str, names: Sequence[str] | None) -> list[str]:
    """Lines on given indices that the network's own names speak against; they are obeyed, since names may be wrong."""
    outputs = Outputs(names)
    against = []
    for info in classes:
        index = getattr(info, field)
        if isinstance(index, int) and 0 <= index < len(outputs.names):
            found = outputs.find(info)
            if found and index not in found:
                against.append(
                    f"class {info.class_id} ({info.name}) is given {field}={index}, which the {network} calls "
                    f"{outputs.names[index]!r}; its {info.name!r} is {found[0]}"
                )
    lines = [f"warning    {text}; check classes.json" for text in against[:5]]
    if len(against) > 5:
        lines.append(f"warning    {len(against) - 5} more given {field}s contradict the {network}'s own names")
    return lines
