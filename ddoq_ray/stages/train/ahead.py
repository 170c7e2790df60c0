"""What lies ahead of a training run: how much each student has to see, who trains it, and how long it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddoq_ray.config import RunConfig
from ddoq_ray.execution.console import span
from ddoq_ray.stages.cells import Cell
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder

# What a step costs beside its images: 8 and 20 views of ConvNets of 32 and 8 channels at 16 px, on a CPU.
STEP_VIEWS = 10
ANSWER_VIEWS = 1  # what a teacher's answer costs that is not stored: half to twice a view of those two networks


@dataclass(frozen=True)
class Load:
    """A student to train.

    Attributes:
        folder: Where it will be.
        network: Students of one architecture at one size cost the same a view.
        views: Images times epochs, `STEP_VIEWS` for each step, `ANSWER_VIEWS` for each answer while it trains.
    """

    folder: str
    network: str
    views: int


def set_size(config: RunConfig, counts: Mapping[int, int]) -> int:
    """Images of a distilled set, as far as the classes have them.

    Args:
        counts: Real images of each class.
    """
    kept = [n for n in counts.values() if n >= config.ipc or config.small_class != "drop"]
    return sum(min(n, config.ipc) for n in kept)


def planned_loads(config: RunConfig, counts: Mapping[int, int], cells: Sequence[Cell]) -> list[Load]:
    """What each student of a run has to see; known before its images are made."""
    found = []
    for cell in cells:
        full = cell.images is None
        images = sum(counts.values()) if full else set_size(config, counts)
        epochs = config.protocol.epochs_for(images, full=full) if images else 0
        answered = config.labels.mode != "hard" and (full or not config.labels.stored)
        seen = images * (1 + ANSWER_VIEWS * answered)
        views = epochs * (seen + STEP_VIEWS * -(-images // config.protocol.batch))
        found.append(Load(cell.folder, f"{cell.student} at {cell.size} px", max(1, views)))
    return found


def group_of(loads: Sequence[Load], groups: int) -> dict[str, int]:
    """folder -> the group that trains it: of each network's views every group has about the same share, in order.

    >>> loads = [Load(name, "net", views) for name, views in (("a", 1), ("b", 1), ("c", 2))]
    >>> group_of(loads, 2)
    {'a': 0, 'b': 0, 'c': 1}
    """
    total: dict[str, int] = {}
    for load in loads:
        total[load.network] = total.get(load.network, 0) + load.views
    before, place = dict.fromkeys(total, 0), {}
    for load in loads:
        place[load.folder] = before[load.network] * groups // total[load.network]
        before[load.network] += load.views
    return place


def seconds_left(loads: Sequence[Load], taken: Mapping[str, float], groups: int) -> tuple[float, int]:
    """(Seconds of the clock for the students that are left, how many are of networks of which none is finished).

    Args:
        loads: All students.
        taken: folder -> seconds of those that are finished.
        groups: Trained side by side.
    """
    spent: dict[str, tuple[float, int]] = {}
    for load in loads:
        if load.folder in taken:
            seconds, views = spent.get(load.network, (0.0, 0))
            spent[load.network] = (seconds + taken[load.folder], views + load.views)
    left = [load for load in loads if load.folder not in taken]
    known = [load for load in left if load.network in spent]
    seconds = sum(load.views * spent[load.network][0] / spent[load.network][1] for load in known)
    return seconds / groups, len(left) - len(known)


class Ahead:
    """Tells how long the students that are left will take: at once where some are finished, else with the first."""

    def __init__(self, loads: Sequence[Load], groups: int, run_dir: Folder) -> None:
        self.loads, self.groups, self.run_dir = loads, groups, run_dir
        self._network = {load.folder: load.network for load in loads}
        self._taken: dict[str, float] = {}
        for load in loads:
            self._take(load.folder)

    def _take(self, folder: str) -> bool:
        """Note a finished student; whether it is the first one of its network."""
        manifest = Artifact(self.run_dir / folder, "train").manifest()
        if manifest is None or folder in self._taken:
            return False
        first = self._network[folder] not in {self._network[other] for other in self._taken}
        self._taken[folder] = float(manifest["seconds"])
        return first

    def words(self) -> str:
        """What is left and how long it will take, by what is finished; empty where nothing is, or all."""
        seconds, unknown = seconds_left(self.loads, self._taken, self.groups)
        left = len(self.loads) - len(self._taken)
        if not self._taken or not left:
            return ""
        more = f"; {unknown} of these are of networks of which none is finished, and not counted" if unknown else ""
        return (
            f"train      about {span(seconds)} for the {left} students that are left, by those that are finished{more}"
        )

    def finished(self, row: Cell) -> str:
        """What to say when a student is finished; empty where one of its network was before."""
        return self.words() if self._take(row.folder) else ""
