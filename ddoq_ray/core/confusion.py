"""Which classes a teacher calls by another class's name: the mark of a wrong class mapping, told from a hard class.

Shapes: N scored images, C classes of the data, O outputs of the teacher.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

SIGNIFICANCE = 0.05  # over all classes together: how often teachers that are right may be suspected


@dataclass(frozen=True)
class Mistaken:
    """A class whose images are called something else.

    Attributes:
        class_id: The class.
        called: What most of its images are called: a class_id, or an output of the teacher (see `foreign`).
        foreign: Whether `called` is an output that no class of the data has.
        share: Part of the class's images that are called so.
        own: Part of them that are called by their own name.
        images: Images of the class that were scored.
    """

    class_id: int
    called: int
    foreign: bool
    share: float
    own: float
    images: int


def swapped_classes(class_ids: Int64, named: Int64, output: Int64, columns: Sequence[int]) -> list[Mistaken]:
    """Classes that a wrong mapping explains, and hardness does not.

    Two rules, both for classes of which more than half the images get one wrong name:

    - *Exchanged.* The wrong name is a class whose own images are not called by it either, but by a third name (or by
      the first class's: a swap). A class that is merely hard is taken for one that is recognised, which takes in both
      its own images and the other's; that never counts, however hard the class is. The own share must be below a third
      of the wrong name's.
    - *Foreign.* The wrong name is an output of the teacher that no class of the data has, and it is ten times as
      frequent as the own one.

    Few images a class prove little, so that each suspicion must also pass a sign test: were the own name at least as
    likely as the wrong one, as it is for any teacher that is right, so many wrong names among both would come with
    probability p; a class and the one that it is taken for are two such tests, and p times the number of classes must
    be below `SIGNIFICANCE`. Five images of each of two swapped classes among ten suffice; three do not.

    Args:
        class_ids: int64 [N], the classes of the images.
        named: int64 [N], the class (of the data's) that the teacher chooses.
        output: int64 [N], the output that it chooses among all it has.
        columns: [C] the output that means each class.

    Returns:
        The suspects, in order of class_id.
    """
    ours = set(columns)
    order = np.argsort(class_ids, kind="stable")
    bounds = np.searchsorted(class_ids[order], np.arange(len(columns) + 1))
    inside: dict[int, tuple[Mistaken, float]] = {}
    foreign: dict[int, Mistaken] = {}
    for c, column in enumerate(columns):
        mine = order[bounds[c] : bounds[c + 1]]
        if (seen := _suspect(c, Counter(named[mine].tolist()), c, 3.0)) is not None:
            inside[c] = seen
        names = Counter(output[mine].tolist())
        seen = _suspect(c, names, column, 10.0, ours)
        if seen is not None and seen[1] * len(columns) < SIGNIFICANCE:
            foreign[c] = seen[0]
    found: dict[int, Mistaken] = {}
    for suspect, p in inside.values():
        other = inside.get(suspect.called)
        if other is not None and p * other[1] * len(columns) < SIGNIFICANCE:
            found |= {suspect.class_id: suspect, other[0].class_id: other[0]}
    return [(foreign | found)[c] for c in sorted(foreign | found)]


def _suspect(
    class_id: int, names: Counter[int], own_name: int, times: float, known: Collection[int] | None = None
) -> tuple[Mistaken, float] | None:
    """The most frequent wrong name of a class and the sign test's p, where it has more than half of the images.

    Args:
        names: What its images are called, and how often.
        own_name: What they should be called.
        times: The wrong name must be more than so many times as frequent as the own one.
        known: Names that do not count as wrong ones here.
    """
    images, own = sum(names.values()), names[own_name]
    wrong = [(n, -name) for name, n in names.items() if name != own_name and name not in (known or ())]
    if not wrong:
        return None
    most, negative = max(wrong)  # of equals the lowest name
    if 2 * most <= images or most < times * own + 1:
        return None
    suspect = Mistaken(class_id, -negative, known is not None, most / images, own / images, images)
    return suspect, _sign_test(own, most)


def _sign_test(own: int, other: int) -> float:
    """P(at most `own` heads among own + other throws of a fair coin)."""
    n = own + other
    return math.fsum(math.comb(n, i) * 0.5**n for i in range(own + 1)) if n < 1000 else 0.0
