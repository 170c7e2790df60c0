"""The report's curves, table and sample images, for the tracker that a user has: TensorBoard, Weights & Biases, MLflow.

Each adapter takes the same parts and uses what its library documents, no more. The libraries are extras of the package
(`pip install "ddoq_ray[tensorboard]"`); where one is missing, a run that asks for it says so before anything starts.
"""

from __future__ import annotations

import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ddoq_ray.storage import layout
from ddoq_ray.storage.folder import Folder

Curve = tuple[str, str, list[int], list[float]]  # student, what, epochs, values
IMAGES_SHOWN = 40  # of each method


class Tracker(ABC):
    """Where one run's results go; a context that is closed when all is handed over."""

    package: ClassVar[str]

    def __init__(self, name: str, config: Mapping[str, Any], report: Folder) -> None:
        self.name, self.config, self.report = name, config, report
        self.library = import_module(self.package)

    @abstractmethod
    def hand_over(
        self, curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]], images: Mapping[str, list[Image.Image]]
    ) -> str:
        """Give everything to the tracker; where it is to be seen.

        Args:
            curves: Of every student.
            rows: The table: `manifests.ResultRow`.
            images: Method -> sample images, RGB.
        """


class TensorBoard(Tracker):
    """Event files in ``report/tensorboard``, a folder a student, so that one chart holds all students."""

    package = "tensorboardX"

    def hand_over(
        self, curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]], images: Mapping[str, list[Image.Image]]
    ) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            for student in dict.fromkeys(curve[0] for curve in curves):
                with self.library.SummaryWriter(os.path.join(scratch, layout.word(student))) as writer:
                    for _, what, epochs, values in (curve for curve in curves if curve[0] == student):
                        for epoch, value in zip(epochs, values, strict=True):
                            writer.add_scalar(what, value, epoch)
            with self.library.SummaryWriter(os.path.join(scratch, "results")) as writer:
                if rows:
                    writer.add_text("results", _markdown(rows))
                for method, shown in images.items():
                    for number, image in enumerate(shown):
                        writer.add_image(f"{method}/{number:03d}", np.asarray(image), dataformats="HWC")
            folder = self.report / layout.TENSORBOARD
            folder.remove()  # of an earlier report: its curves would be drawn beside these
            for file in sorted(path for path in Path(scratch).rglob("*") if path.is_file()):
                folder.publish(file.relative_to(scratch).as_posix(), file.read_bytes())
        return folder.uri


class Wandb(Tracker):
    """A Weights & Biases run; where it goes follows from its own environment variables (WANDB_PROJECT, WANDB_MODE)."""

    package = "wandb"

    def hand_over(
        self, curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]], images: Mapping[str, list[Image.Image]]
    ) -> str:
        project = os.environ.get("WANDB_PROJECT", "ddoq-ray")
        with self.library.init(project=project, name=self.name, config=dict(self.config)) as run:
            run.define_metric("epoch")
            for student in dict.fromkeys(curve[0] for curve in curves):
                run.define_metric(f"{student}/*", step_metric="epoch")
            for student, what, epochs, values in curves:
                for epoch, value in zip(epochs, values, strict=True):
                    run.log({"epoch": epoch, f"{student}/{what}": value})
            if rows:
                columns = list(rows[0])
                data = [[row.get(column) for column in columns] for row in rows]
                run.log({"results": self.library.Table(columns=columns, data=data)})
            for method, shown in images.items():
                run.log({f"images/{method}": [self.library.Image(image) for image in shown]})
            return str(run.url or run.dir)


class MLflow(Tracker):
    """An MLflow run; where it goes follows from its own environment variables (MLFLOW_TRACKING_URI, ...)."""

    package = "mlflow"

    def hand_over(
        self, curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]], images: Mapping[str, list[Image.Image]]
    ) -> str:
        with self.library.start_run(run_name=self.name) as run:
            self.library.log_dict(dict(self.config), "config.json")
            for student, what, epochs, values in curves:
                for epoch, value in zip(epochs, values, strict=True):
                    self.library.log_metric(f"{student}/{what}", value, step=epoch)
            if rows:
                self.library.log_table({name: [row.get(name) for row in rows] for name in rows[0]}, layout.RESULTS)
            for method, shown in images.items():
                for number, image in enumerate(shown):
                    self.library.log_image(image, artifact_file=f"images/{method}/{number:03d}.png")
            return f"{self.library.get_tracking_uri()}, run {run.info.run_id}"


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def check(tracking: str | None) -> None:
    """That the tracker's library is there.

    Raises:
        ValueError: It is not, with what to install.
    """
    if tracking is None:
        return
    package = TRACKERS[tracking].package
    try:
        import_module(package)
    except ImportError as error:
        raise ValueError(
            f"tracking={tracking} needs the package {package}, which cannot be imported here ({error}): "
            f'pip install "ddoq_ray[{tracking}]", or leave tracking out'
        ) from None


def hand_over(tracking: str, report: Folder, results: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> str:
    """Give a report's curves, table and images to a tracker; where it is to be seen.

    Args:
        report: The report's folder.
        results: What ``results.json`` holds.
        images: As the page is given: each with its method and its file's bytes (png).
    """
    tracker = TRACKERS[tracking](results["name"], results["config"], report)
    shown: dict[str, list[Image.Image]] = {}
    for image in images:
        mine = shown.setdefault(image["method"], [])
        if len(mine) < IMAGES_SHOWN:
            mine.append(Image.open(io.BytesIO(image["png"])).convert("RGB"))
    return tracker.hand_over(list(_curves(results["curves"])), results["rows"], shown)


def _curves(curves: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    """Without the epochs that have no value."""
    for curve in curves:
        for what in ("train_loss", "top1_pct"):
            points = [(e, v) for e, v in zip(curve["epochs"], curve[what], strict=True) if v is not None]
            if points:
                yield f"{curve['method']}-seed{curve['seed']}", what, [e for e, _ in points], [v for _, v in points]


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
