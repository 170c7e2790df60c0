"""The teacher is checked on real validation images before anything is spent on what its labels are worth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray

from ddoq_ray.config import RunConfig
from ddoq_ray.core.confusion import Mistaken, swapped_classes
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.workers import on_actor, say
from ddoq_ray.stages.evaluate.validation import Validation, check_refused, say_refused, teacher_columns
from ddoq_ray.stages.label.autoencoder_check import say_kept
from ddoq_ray.stages.label.teacher import Named, spawner
from ddoq_ray.stages.step import Step
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.manifests import Scored
from ddoq_ray.storage.prepared import Data


def check_early(run: Run, steps: Sequence[Step]) -> dict[str, Any] | None:
    """`check_teacher` before anything is encoded, where some of the labels `steps` are not made by it yet."""
    made = [step.artifact(run.dir).manifest() for step in steps]
    if all(m is not None and m["identity"].get("teacher") == run.networks.teacher_id for m in made):
        return None
    return check_teacher(run)


def check_teacher(run: Run) -> dict[str, Any]:
    """Evaluate the teacher on the real validation images, class by class.

    Raises:
        ValueError: As `judge`.
    """
    columns, arch = teacher_columns(run.data), run.networks.teacher_arch
    validation = Validation.of(run.config, run.data)

    def ask(actor: Any) -> tuple[Named, Sequence[str] | None, dict[str, Any] | None]:
        named: Named = ray.get(actor.name_images.remote(validation, columns))
        made = "synthesize" in run.config.stages and named.class_ids.size > 0
        kept = ray.get(actor.judge_autoencoder.remote(validation, columns)) if made else None
        return named, ray.get(actor.class_names.remote()), kept

    named, names, kept = on_actor(spawner(run.config, run.dir), ask, partial(run.events.add, stage="label"))
    found = judge(run.config, run.dir, run.data, named, names)
    top1, images = found["top1_pct"], found["images"]
    say(f"label      teacher {arch}: top-1 {top1:.2f} % on {images:,} real validation images")
    run.events.add("teacher checked", **found)
    if kept is not None:
        say_kept(run.config, kept)
        run.events.add("autoencoder checked", **kept)
        found |= {"autoencoder": kept}
    return found | {"arch": arch, "id": run.networks.teacher_id}


def judge(config: RunConfig, run_dir: Folder, data: Data, named: Named, names: Sequence[str] | None) -> dict[str, Any]:
    """Whether labels of the teacher that said this may be used; its figures.

    Args:
        named: What it calls the validation images.
        names: Of its outputs, where it has them.

    Raises:
        ValueError: When too many of the images cannot be read; when its outputs are not finite; when its top-1 is below
            `teacher.min_top1`; when classes are called by other classes' names in a way that only a wrong mapping
            explains. Labels from it would ruin every student.
    """
    columns = teacher_columns(data)
    images = len(named.class_ids)
    facts: Scored = {"images": images, "refused": named.refused, "reasons": named.reasons}
    check_refused(config, run_dir, images, named.refused, named.reasons)
    say_refused("label", run_dir, facts)
    if named.not_finite:
        raise ValueError(
            f"the teacher's outputs are not finite (NaN or infinite) on {named.not_finite} of {images} real validation "
            "images: its weights are damaged, or were made in half precision and overflow; give another teacher.path"
        )
    top1 = 100.0 * float((named.chosen == named.class_ids).mean())
    _say_untested(data, named)
    _check_classes(data, named, columns, names)
    least = config.teacher.threshold(len(columns))
    if top1 < least:
        raise ValueError(
            f"the teacher has top-1 {top1:.2f} % on {images} real validation images, below "
            f"teacher.min_top1={least:g}. A low figure usually means a wrong class mapping "
            "(teacher_index in classes.json), other preprocessing, or a teacher of another dataset"
        )
    return {"top1_pct": top1, **facts}


def _say_untested(data: Data, named: Named) -> None:
    """What the figure does not cover."""
    if len(data.classes) == 1:
        say("label      the data has one class: whatever the teacher answers is right, so this is no test of it")
    seen = set(np.unique(named.class_ids).tolist())
    unseen = [c.name for c in data.classes if c.class_id not in seen]
    if unseen:
        more = ", ..." if len(unseen) > 5 else ""
        say(
            f"label      {len(unseen):,} of {len(data.classes):,} classes have no validation image, so that neither "
            f"the teacher nor a student is tested on them: {', '.join(unseen[:5])}{more}"
        )


def _check_classes(data: Data, named: Named, columns: Sequence[int], names: Sequence[str] | None) -> None:
    found = swapped_classes(named.class_ids, named.chosen, named.outputs, columns)
    if not found:
        return
    lines = [_words(data, m, columns, names) for m in found[:8]]
    more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
    raise ValueError(
        f"the teacher calls {len(found)} of {len(data.classes)} classes by another name, as with a wrong mapping:\n  "
        + "\n  ".join([*lines, *more])
        + "\nMend teacher_index in classes.json (or the class list, if its order is not that of the labels). A class "
        "that is only hard does not stop a run: see core/confusion.py for the rule"
    )


def _words(data: Data, m: Mistaken, columns: Sequence[int], names: Sequence[str] | None) -> str:
    if m.foreign:
        told = f" ({names[m.called]!r})" if names else ""
        called = f"output {m.called}{told}, which no class of the data has,"
    else:
        called = repr(data.classes[m.called].name)
    return (
        f"images of {data.classes[m.class_id].name!r} are called {called} in {100 * m.share:.0f} % and rightly in "
        f"{100 * m.own:.0f} % of {m.images}: is teacher_index={columns[m.class_id]} another class's?"
    )
