"""The steps of a run in order, top to bottom: the only file that knows them all."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import ray
import yaml

from ddoq_ray import __version__
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config, to_yaml
from ddoq_ray.config.run import run_config
from ddoq_ray.execution import lease, networks, places, signals
from ddoq_ray.execution.console import doing
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.session import locate, may_grow, own_node, ray_session
from ddoq_ray.execution.waiting import patience
from ddoq_ray.execution.workers import Events, say
from ddoq_ray.provenance import commit
from ddoq_ray.stages import demands
from ddoq_ray.stages.cells import cells, label_key, methods
from ddoq_ray.stages.encode import heldout
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.evaluate import step as evaluate
from ddoq_ray.stages.label import step as label
from ddoq_ray.stages.label import teacher_check
from ddoq_ray.stages.prepare import mapping
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.stages.quantize import step as quantize
from ddoq_ray.stages.quantize.memory import check_memory
from ddoq_ray.stages.report import step as report
from ddoq_ray.stages.select import step as select
from ddoq_ray.stages.step import Step
from ddoq_ray.stages.synthesize import step as synthesize
from ddoq_ray.stages.train import step as train
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place

AStep = TypeVar("AStep", bound=Step)
CONFIG_CHECK = "# sha256 of the above: "


def steps(config: RunConfig) -> list[Step]:
    """Every step of a run, in order; which of them are wanted is for each to say (`Step.wanted`)."""
    found: list[Step] = [prepare.Prepare(), encode.Encode()]
    sets: dict[Place, synthesize.Synthesize | select.Select] = {}
    for method in methods(config):
        for draw, place in enumerate(method.sets):
            if place not in sets and method.spec.images == "synthesize":
                found.append(quantize.Quantize(method.spec, place))
                sets[place] = synthesize.Synthesize(place)
            elif place not in sets:
                sets[place] = select.Select(method.spec, place, draw)
    found += [step for step in sets.values() if isinstance(step, synthesize.Synthesize)]
    found += [step for step in sets.values() if isinstance(step, select.Select)]
    labels = {place: label.Label(source, place, label_key(config)) for place, source in sets.items()}
    found += [*labels.values(), heldout.EncodeHeldout()]
    by_place = {place.images: place for place in sets}
    for cell in cells(config):
        at = by_place.get(cell.images or "")
        source, learnt = (sets[at], labels[at]) if at is not None else (None, None)
        found.append(train.Train(cell, source, learnt if cell.labels is not None else None))
    return [*found, evaluate.Evaluate(), report.Report()]


def of_kind(kind: type[AStep], planned: Sequence[Step]) -> list[AStep]:
    return [step for step in planned if isinstance(step, kind)]


def run(config: RunConfig) -> str | None:
    """Run the configured stages; return the report's path when there is one.

    Raises:
        ValueError: For anything that users can mend: data, configuration, permissions, class mappings.
    """
    start = time.time()
    places.check_lasting(config.folder, "run_dir")
    places.check_apart(config)
    run_dir = Folder(config.folder)
    run_dir.check_writable()
    planned = steps(config)
    check_run_dir(config, run_dir, planned)
    with lease.held(run_dir) as hold, doing("run"):
        # Before Ray and before any stage begins: what cannot work is said now.
        teacher = bool(set(config.stages) & {"label", "train", "evaluate"})
        where = locate(config.cluster)
        if where is None and not ray.is_initialized():
            demands.plan(config, planned, [own_node(config.cluster)], may_grow=False)
        known = networks.Inspection(config, teacher=teacher).result() if config.prior.path is not None else None
        if known is not None:
            networks.check_side(config, known)
        own_session = not ray.is_initialized()
        with ray_session(config.cluster, where), patience(config.cluster, own_session):
            fitted = _fit(config, planned)
            places.check_nodes(run_dir, places.named_paths(config))
            events = Events(run_dir)
            events.add("run started", stages=list(config.stages), command=sys.argv[1:])
            try:
                path = _steps(config, fitted, run_dir, events, known, hold.check)
            except BaseException as error:
                with contextlib.suppress(Exception):
                    events.add("run stopped", reason=type(error).__name__)
                raise
            events.add("run finished", seconds=round(time.time() - start, 1))
    say(f"finished   {', '.join(config.stages)} in {time.time() - start:.0f} s; everything is in {run_dir.uri}")
    return path


def _fit(config: RunConfig, planned: Sequence[Step]) -> RunConfig:
    """The configuration with pools that this Ray has room for; what depends on them is said, never a result.

    Raises:
        ValueError: When a wanted stage cannot fit, naming it and the key to change.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitted, words = demands.plan(config, planned, nodes, may_grow=may_grow())
    for line in words:
        say(line)
    return fitted


def check_run_dir(config: RunConfig, run_dir: Folder, planned: Sequence[Step]) -> None:
    """Before Ray starts: refuse a run directory that another configuration made, naming both."""
    for step in planned if not config.overwrite else ():
        if step.checked(config):
            step.artifact(run_dir).check(step.settings(config), partial=True)


def set_sizes(config: RunConfig, counts: Mapping[int, int]) -> dict[str, int]:
    """Images in a distilled set, and in `full` where it is wanted."""
    kept = [n for n in counts.values() if n >= config.ipc or config.small_class != "drop"]
    distilled = {"the distilled set": sum(min(n, config.ipc) for n in kept)}
    return distilled | ({"full": sum(counts.values())} if "full" in config.methods else {})


def recorded(text: str) -> str:
    """The text of a ``config.yaml``, its digest in its last line."""
    return f"{text}{CONFIG_CHECK}{digest_of(text.encode())}\n"


def recorded_text(run_dir: Folder) -> str:
    """A run directory's ``config.yaml``, as it was written.

    Raises:
        ValueError: It is missing or damaged.
    """
    path = run_dir.path(layout.CONFIG)
    try:
        text, mark, check = run_dir.read(layout.CONFIG).decode("utf-8", "replace").rpartition(CONFIG_CHECK)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected the folder of a run, which holds one") from None
    if not mark or check.strip() != digest_of(text.encode()):
        raise ValueError(f"{path} is damaged: it is not as it was written; the command that made the run writes it")
    return text


def recorded_config(run_dir: Folder) -> RunConfig:
    """The configuration that a run directory was last made with.

    Raises:
        ValueError: Its ``config.yaml`` is missing, damaged, or of another version of this package.
    """
    return run_config(yaml.safe_load(recorded_text(run_dir)))


def _publish_config(asked: RunConfig, run_dir: Folder, environment: Mapping[str, object]) -> None:
    made_with = {"commit": commit(), "ddoq_ray": __version__, **environment}
    header = "".join(f"# {key}: {value}\n" for key, value in made_with.items())
    run_dir.publish(layout.CONFIG, recorded(header + to_yaml(asked)).encode())


def _steps(
    asked: RunConfig,
    config: RunConfig,
    run_dir: Folder,
    events: Events,
    known: networks.Networks | None,
    still_ours: Callable[[], None],
) -> str | None:
    """Prepare, then everything that is wanted.

    Args:
        asked: The configuration as given, which is recorded.
        config: The same, with pools that fit the cluster.
        known: Facts of the networks; None where data is prepared for a prior that is yet to be chosen.
        still_ours: Raises when another run has taken the run directory over.
    """
    wanted = set(config.stages)
    with doing("prepare"):
        data = prepare.run(config, run_dir, events)
    if known is None:
        assert wanted == {"prepare"}, wanted
        _publish_config(asked, run_dir, {})
        return None
    if wanted & {"quantize", "synthesize"}:
        prepare.check_small_classes(config, data.counts, data.classes)
    data = mapping.resolve(data, known, required=wanted != {"prepare"})
    run = Run(config, run_dir, data, known, events)
    planned = steps(config)
    labels, students = of_kind(label.Label, planned), of_kind(train.Train, planned)
    # Before anything is spent: sets that a student cannot take, a wrong class mapping, unreadable validation images.
    if "train" in wanted:
        networks.check_batches(set_sizes(config, data.counts), config, known)
    checked = teacher_check.check_early(run, labels) if "label" in wanted else None
    _publish_config(asked, run_dir, known.environment)

    _distil(run, planned)
    still_ours()
    if "label" in wanted:
        with doing("label"):
            label.run(run, labels, checked)
    # Started here, waited for by the report: it takes no time of its own while students train.
    unseen = heldout.Heldout(run) if "report" in wanted else None
    if unseen is not None:
        unseen.start()
    if "train" in wanted:
        with signals.own_ctrl_c(), doing("train"):
            train.run(run, students)
    still_ours()
    if "evaluate" in wanted:
        with doing("evaluate"):
            evaluate.run(run, students)
    path = report.run(run, asked, unseen, planned) if unseen is not None else None
    if not config.latents.keep:
        encode.discard(run_dir / layout.LATENTS, events)
        encode.discard(run_dir / layout.HELDOUT, events)
    return path


def _distil(run: Run, planned: Sequence[Step]) -> None:
    """Real images to image sets: encode and quantize at the same time, then synthesize and select."""
    wanted = set(run.config.stages)
    if wanted & {"encode", "quantize"}:
        books = [quantize.Quantizers(run, step) for step in of_kind(quantize.Quantize, planned) if "quantize" in wanted]
        # Quantizers pull the latent log while encoders still write it.
        try:
            for book in books:
                book.plan()
            check_memory([need for book in books for need in book.needs])
            for book in books:
                book.launch()

            def on_shard(shard: int) -> None:
                for book in books:
                    book.shard_done(shard)

            with doing("encode"):
                if encode.Encode().wanted(run.config):
                    encode.run(run, on_shard)
                else:
                    encode.reuse(run, on_shard)
            with doing("quantize"):
                for book in books:
                    book.finish()
        finally:
            for book in books:
                book.close()
    if "synthesize" in wanted:
        with doing("synthesize"):
            synthesize.run(run, of_kind(synthesize.Synthesize, planned))
        for step in of_kind(select.Select, planned):
            with doing(step.method.name):
                select.run(run, step)


def distill(*overrides: str, run_dir: str | os.PathLike[str] | None = None) -> str:
    """Run from a notebook: ``distill("ipc=1", "quantizer=gram")``; returns the run directory.

    Args:
        overrides: `key=value` as on the command line.
        run_dir: Where everything goes; by default runs/<dataset>-ipc<ipc>.
    """
    config = load_config([*overrides, *([f"run_dir={os.fspath(run_dir)}"] if run_dir is not None else [])])
    run(config)
    return Folder(config.folder).uri
