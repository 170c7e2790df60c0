"""The steps of a run in order, top to bottom: the only file that knows them all."""

from __future__ import annotations

import contextlib
import os
import posixpath
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import ray
import yaml

from ddoq_ray import __version__
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compare import CompareConfig
from ddoq_ray.config.compose import load_config, parts_of, to_yaml
from ddoq_ray.config.methods import SPECS
from ddoq_ray.config.run import configured
from ddoq_ray.execution import lease, metrics, networks, places, processors, signals
from ddoq_ray.execution.console import doing, lines_as
from ddoq_ray.execution.run import Run
from ddoq_ray.execution.session import locate, may_grow, own_node, ray_session
from ddoq_ray.execution.waiting import patience
from ddoq_ray.execution.workers import Events, say
from ddoq_ray.provenance import commit
from ddoq_ray.stages import demands
from ddoq_ray.stages.cells import cells, label_key, methods, own_set
from ddoq_ray.stages.encode import heldout
from ddoq_ray.stages.encode import step as encode
from ddoq_ray.stages.evaluate import step as evaluate
from ddoq_ray.stages.given import step as given
from ddoq_ray.stages.label import step as label
from ddoq_ray.stages.label import teacher_check
from ddoq_ray.stages.prepare import mapping
from ddoq_ray.stages.prepare import step as prepare
from ddoq_ray.stages.quantize import step as quantize
from ddoq_ray.stages.quantize.memory import check_memory
from ddoq_ray.stages.recover import step as recover
from ddoq_ray.stages.report import comparison, trackers
from ddoq_ray.stages.report import step as report
from ddoq_ray.stages.select import step as select
from ddoq_ray.stages.step import ImageSetStep, Step
from ddoq_ray.stages.synthesize import step as synthesize
from ddoq_ray.stages.train import step as train
from ddoq_ray.stages.train.ahead import set_size
from ddoq_ray.storage import layout
from ddoq_ray.storage.artifact import digest_of
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.layout import Place

AStep = TypeVar("AStep", bound=Step)
OTHERS: dict[type[ImageSetStep], Callable[[Run, Any], None]] = {
    recover.Recover: recover.run,
    given.Given: given.run,
}  # image sets that are made one by one
SOURCES = (synthesize.Synthesize, select.Select, *OTHERS)  # of image sets, in the order in which they work
MAKING = {"prepare", "encode", "quantize", "synthesize"}  # stages that a new run directory may begin with
CONFIG_CHECK = "# sha256 of the above: "


def steps(config: RunConfig) -> list[Step]:
    """Every step of a run, in order; which of them are wanted is for each to say (`Step.wanted`).

    Of a comparison, those of all its parts, each once.
    """
    if isinstance(config, CompareConfig):
        parts = [step for part in config.parts() for step in steps(part)]
        return list({(step.name, step.place): step for step in parts}.values())
    found: list[Step] = [prepare.Prepare(), encode.Encode()]
    sets: dict[Place, ImageSetStep] = {}
    for method in methods(config):
        for draw, place in enumerate(method.sets):
            if place not in sets and method.spec.images == "synthesize":
                if method.spec.quantizer is not None:
                    found.append(quantize.Quantize(method.spec, place))
                sets[place] = synthesize.Synthesize(place, method.spec)
            elif place not in sets and method.spec.images == "recover":
                sets[place] = recover.Recover(method.spec, place)
            elif place not in sets and method.spec.images == "given":
                sets[place] = given.Given(method.spec, place)
            elif place not in sets:
                sets[place] = select.Select(method.spec, place, draw)
    if own_set(config) not in sets and any("codebook" in method.spec.reads for method in methods(config)):
        found.append(quantize.Quantize(SPECS[config.own_method], own_set(config)))
    found += sorted(sets.values(), key=lambda step: SOURCES.index(type(step)))
    labels = {place: label.Label(source, place, label_key(config)) for place, source in sets.items()}
    found += [*labels.values(), *([] if config.compared else [heldout.EncodeHeldout()])]
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
    lines_as(config.cluster.log)
    trackers.check(config.tracking)
    places.check_lasting(config.folder, "run_dir")
    places.check_apart(config)
    run_dir = Folder(config.folder)
    run_dir.check_writable()
    parts = parts_of(config)
    for part in parts:
        check_run_dir(part, run_dir, steps(part))
    # A report of a run that is at work is made beside it, of what is finished; it writes nothing else there.
    beside = lease.at_work(run_dir) if config.stages == ("report",) else ""
    if beside:
        say(f"report     {run_dir.uri} is at work ({beside}): of what is finished by now")
    if not set(config.stages) & MAKING:  # a mistyped folder, for which a whole collection would be packed first
        prepare.Prepare().artifact(run_dir).require()
    with contextlib.nullcontext() if beside else lease.held(run_dir) as hold, doing("run"):
        # Before Ray and before any stage begins: what cannot work is said now.
        where = locate(config.cluster)
        if where is None and not ray.is_initialized():
            for part in parts:
                demands.plan(part, steps(part), [own_node(config.cluster)], may_grow=False)
        known = _known(parts) if config.prior.path is not None else None
        own_session = not ray.is_initialized()
        name = posixpath.basename(run_dir.uri)
        named = list(dict.fromkeys(n for part in parts for n in places.named_paths(part)))
        with (
            ray_session(config.cluster, where),
            patience(config.cluster, own_session),
            places.LateNodes(run_dir, named, own_session) if may_grow() else contextlib.nullcontext(),
            metrics.published(name) as hear,
        ):
            fitted = _fit(parts)
            places.check_nodes(run_dir, named)
            events = Events(None if beside else run_dir, hear)
            events.add("run started", stages=list(config.stages), command=sys.argv[1:])
            try:
                path = _steps(config, fitted, run_dir, events, known, hold.check if hold else None)
            except BaseException as error:
                with contextlib.suppress(Exception):
                    events.add("run stopped", reason=type(error).__name__)
                raise
            events.add("run finished", seconds=round(time.time() - start, 1))
    say(f"finished   {', '.join(config.stages)} in {time.time() - start:.0f} s; everything is in {run_dir.uri}")
    return path


def _known(parts: Sequence[RunConfig]) -> list[networks.Networks]:
    """Facts of the networks of each part.

    Raises:
        ValueError: A network cannot be loaded, or does not go with the settings.
    """
    found = []
    for part in parts:
        found.append(networks.Inspection(part, teacher=networks.asks_teacher(part)).result())
        networks.check_side(part, found[-1])
        networks.check_methods(part, found[-1])
    return found


def _fit(parts: Sequence[RunConfig]) -> list[RunConfig]:
    """The configurations with pools that this Ray has room for; what depends on them is said, never a result.

    Raises:
        ValueError: When a wanted stage cannot fit, naming it and the key to change.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = [demands.plan(part, steps(part), nodes, may_grow=may_grow()) for part in parts]
    for line in dict.fromkeys(line for _, words in found for line in words):
        say(line)
    return [fitted for fitted, _ in found]


def check_run_dir(config: RunConfig, run_dir: Folder, planned: Sequence[Step]) -> None:
    """Before Ray starts: refuse a run directory that another configuration made, naming both."""
    for step in planned if not config.overwrite else ():
        if step.checked(config):
            step.artifact(run_dir).check(step.settings(config), partial=True)


def set_sizes(config: RunConfig, counts: Mapping[int, int]) -> dict[str, int]:
    """Images in a distilled set, and in `full` where it is wanted."""
    distilled = {"the distilled set": set_size(config, counts)}
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
    values = yaml.safe_load(recorded_text(run_dir))
    return configured(CompareConfig if "ipcs" in values else RunConfig, values)


def _publish_config(asked: RunConfig, run_dir: Folder, environment: Mapping[str, object]) -> None:
    made_with = {"commit": commit(), "ddoq_ray": __version__, **environment}
    header = "".join(f"# {key}: {value}\n" for key, value in made_with.items())
    run_dir.publish(layout.CONFIG, recorded(header + to_yaml(asked)).encode())


def _steps(
    asked: RunConfig,
    parts: Sequence[RunConfig],
    run_dir: Folder,
    events: Events,
    known: Sequence[networks.Networks] | None,
    still_ours: Callable[[], None] | None,
) -> str | None:
    """Prepare, then everything that is wanted.

    Args:
        asked: The configuration as given, which is recorded.
        parts: The same, with pools that fit the cluster; of a comparison, each of its runs.
        known: Facts of the networks of each part; None where data is prepared for a prior that is yet to be chosen.
        still_ours: Raises when another run has taken the run directory over; None where another holds it, and this
            one only reports.
    """
    wanted = set(asked.stages)
    with doing("prepare"):
        data = prepare.run(parts[0], run_dir, events)
    if known is None:
        assert wanted == {"prepare"}, wanted
        _publish_config(asked, run_dir, {})
        return None
    if wanted & {"quantize", "synthesize"}:
        for part in parts:
            prepare.check_small_classes(part, data.counts, data.classes)
    resolved = {f.teacher_id: mapping.resolve(data, f, required=wanted != {"prepare"}) for f in _each_teachers(known)}
    runs = [Run(part, run_dir, resolved[f.teacher_id], f, events) for part, f in zip(parts, known, strict=True)]
    planned = _each_once(runs)
    if still_ours is None:
        return _report(asked, planned, None if asked.compared else heldout.Heldout(runs[0]).left_alone())
    # Before anything is spent: sets that a student cannot take, a wrong class mapping, unreadable validation images.
    if "train" in wanted:
        counts = data.counts
        for run in runs:
            networks.check_batches(set_sizes(run.config, counts), run.config, run.networks)
    checked = _checked_teachers(planned) if "label" in wanted else {}
    _publish_config(asked, run_dir, known[0].environment)
    if asked.compared:
        comparison.say_estimate(planned)
    path = _work(asked, planned, checked, still_ours)
    if not asked.latents.keep:
        encode.discard(run_dir / layout.LATENTS, events)
        encode.discard(run_dir / layout.HELDOUT, events)
    return path


def _work(
    asked: RunConfig,
    planned: Sequence[tuple[Run, Sequence[Step]]],
    checked: Mapping[str | None, dict[str, Any] | None],
    still_ours: Callable[[], None],
) -> str | None:
    """Everything after the data is prepared and the networks are known; `checked`: what was found of each teacher."""
    wanted = set(asked.stages)
    first, students = planned[0][0], [(run, of_kind(train.Train, steps)) for run, steps in planned]
    if "train" in wanted:  # said before the hours that lead to it
        trained = (step.artifact(run.dir) for run, steps in students for step in steps)
        processors.say_slow_bfloat16(asked.cluster.trainer, trained)
    for run, steps in planned:
        _codebooks(run, steps)
    if "synthesize" in wanted:
        with doing("synthesize"):
            synthesize.synthesize([(run, of_kind(synthesize.Synthesize, steps)) for run, steps in planned])
        select.run([(run, step) for run, steps in planned for step in of_kind(select.Select, steps)])
        for run, steps in planned:
            for kind, make in OTHERS.items():
                for step in of_kind(kind, steps):
                    with doing(step.method.name):
                        make(run, step)
    still_ours()
    if "label" in wanted:
        with doing("label"):
            label.label([(run, of_kind(label.Label, steps)) for run, steps in planned], checked)
    # Started here, waited for by the report: it takes no time of its own while students train.
    unseen = heldout.Heldout(first) if "report" in wanted and not asked.compared else None
    if unseen is not None:
        unseen.start()
    if "train" in wanted:
        with signals.own_ctrl_c(), doing("train"):
            train.train(students)
    still_ours()
    if "evaluate" in wanted:
        with doing("evaluate"):
            evaluate.evaluate(students)
    return _report(asked, planned, unseen) if "report" in wanted else None


def _report(
    asked: RunConfig, planned: Sequence[tuple[Run, Sequence[Step]]], unseen: heldout.Heldout | None
) -> str | None:
    """The page of a run or of a comparison; `unseen`: a run's held-out latents, on their way."""
    if isinstance(asked, CompareConfig):
        return comparison.run(planned, asked)
    assert unseen is not None
    return report.run(planned[0][0], asked, unseen, planned[0][1])


def _each_teachers(known: Sequence[networks.Networks]) -> list[networks.Networks]:
    """The facts of one part for each teacher, which alone decides where the classes are."""
    return list({facts.teacher_id: facts for facts in known}.values())


def _each_once(runs: Sequence[Run]) -> list[tuple[Run, list[Step]]]:
    """The steps of each run, without those of an earlier one: images and labels that several students share."""
    seen: set[tuple[str, str]] = set()
    found = []
    for run in runs:
        mine = [step for step in steps(run.config) if (step.name, step.place) not in seen]
        seen |= {(step.name, step.place) for step in mine}
        found.append((run, mine))
    return found


def _checked_teachers(planned: Sequence[tuple[Run, Sequence[Step]]]) -> dict[str | None, dict[str, Any] | None]:
    """What the check of each teacher found, by its digest; None where its labels are made already."""
    checked: dict[str | None, dict[str, Any] | None] = {}
    for run, steps in planned:
        if checked.get(run.networks.teacher_id) is None:
            checked[run.networks.teacher_id] = teacher_check.check_early(run, of_kind(label.Label, steps))
    return checked


def _codebooks(run: Run, planned: Sequence[Step]) -> None:
    """Real images to codebooks: encode and quantize at the same time."""
    wanted = {"encode", "quantize"} & set(run.config.stages)
    by_another = run.config.compared and all(step.stage not in ("quantize", "synthesize") for step in planned)
    if not wanted or by_another:  # the latter: by an earlier part of the comparison
        return
    books = [quantize.Quantizers(run, step) for step in of_kind(quantize.Quantize, planned) if "quantize" in wanted]
    # Quantizers pull the latent log while encoders still write it.
    try:
        for book in books:
            book.plan()
        needs, cpus = [need for book in books for need in book.needs], run.config.cluster.quantizer.num_cpus
        if words := check_memory(needs, cpus=cpus, may_grow=may_grow()):
            say(f"waiting    {words}. It will wait until nodes join")
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


def distill(*overrides: str, run_dir: str | os.PathLike[str] | None = None) -> str:
    """Run from a notebook: ``distill("ipc=1", "quantizer=gram")``; returns the run directory.

    Args:
        overrides: `key=value` as on the command line.
        run_dir: Where everything goes; by default runs/<dataset>-ipc<ipc>.
    """
    config = load_config([*overrides, *([f"run_dir={os.fspath(run_dir)}"] if run_dir is not None else [])])
    run(config)
    return Folder(config.folder).uri
