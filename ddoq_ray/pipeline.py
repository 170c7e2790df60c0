"""The stages in order, top to bottom: the only file that knows them all.

A run's own method lives in the run directory itself; every other method has the same folders under
``compare/<method>-ipc<K>/``. Latents, data and the teacher are shared.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from ddoq_ray import __version__
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config, to_yaml
from ddoq_ray.config.quantizer import MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.execution import lease, networks, places, signals
from ddoq_ray.execution.console import doing
from ddoq_ray.execution.session import locate, may_grow, own_node, ray_session
from ddoq_ray.execution.workers import Events, commit, say
from ddoq_ray.stages import demands
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
from ddoq_ray.stages.synthesize import select
from ddoq_ray.stages.synthesize import step as synthesize
from ddoq_ray.stages.train import step as train
from ddoq_ray.stages.train.memory import check_full
from ddoq_ray.storage.artifact import Artifact
from ddoq_ray.storage.folder import Folder
from ddoq_ray.storage.records import StudentRow


@dataclass(frozen=True)
class Method:
    """A method of the comparison, and where its parts are, relative to the run directory.

    Attributes:
        name: The word of the report's rows.
        images: Folders with an image set each (`random` draws one a seed); empty when it trains on the real data.
        students: Folder under which its students/ is.
        quantizer: How its codebook is made; None when it has none of its own.
        scheme: Weight scheme of its images.
    """

    name: str
    images: tuple[str, ...]
    students: str
    quantizer: QuantizerConfig | None
    scheme: str


def plan_methods(config: RunConfig) -> list[Method]:
    """The run's own method and its baselines, as folders, quantizers and weights."""
    methods = []
    for name in config.methods:
        place = "" if name == config.own_method else f"compare/{name}-ipc{config.ipc}"
        if name.startswith("ddoq"):
            scheme = {"ddoq": "counts", "ddoq-sqrt": "sqrt", "ddoq-uniform": "uniform"}[name]
            own = name == config.own_method
            methods.append(Method(name, ("",), place, config.quantizer if own else None, scheme))
        elif name == "d4m":
            d4m = MinibatchKmeansConfig(name="minibatch_kmeans", variant="d4m", num_shards=config.quantizer.num_shards)
            methods.append(Method(name, (place,), place, d4m, "uniform"))
        elif name == "random":
            draws = tuple(f"{place}/draw-{k}" for k in range(config.num_seeds))
            methods.append(Method(name, draws, place, None, "uniform"))
        elif name in select.METHODS:
            methods.append(Method(name, (place,), place, None, "uniform"))
        else:
            assert name == "full", name
            methods.append(Method(name, (), place, None, "uniform"))
    return methods


def student_rows(config: RunConfig, methods: Sequence[Method]) -> list[StudentRow]:
    """Every (method, seed), rows of one image set next to each other."""
    rows = []
    for m in methods:
        for seed in range(config.num_seeds):
            place = m.images[seed if len(m.images) > 1 else 0] if m.images else None
            folder = posixpath.join(m.students, "students", f"{config.student.arch}-seed{seed}")
            online = config.labels.mode == "online"
            rows.append(
                StudentRow(
                    method=m.name,
                    images="data" if place is None else posixpath.join(place, "images"),
                    labels=None if place is None or online else posixpath.join(place, "labels"),
                    folder=folder,
                    scheme=m.scheme,
                    seed=seed,
                )
            )
    return rows


def run(config: RunConfig) -> str | None:
    """Run the configured stages; return the report's path when there is one.

    Raises:
        ValueError: For anything that the person can mend: data, configuration, permissions, class mappings.
    """
    start = time.time()
    places.check_lasting(config.folder, "run_dir")
    places.check_apart(config)
    folder = Folder(config.folder)
    folder.check_writable()
    check_run_folder(config, folder)
    with lease.held(folder) as hold, doing("run"):
        # Before Ray and before any stage begins: what cannot work is said now.
        teacher = bool(set(config.stages) & {"label", "train", "evaluate"})
        where = locate(config.cluster)
        if where is None and not ray.is_initialized():
            demands.plan(config, _codebooks(config), [own_node(config.cluster)], may_grow=False)
        known = networks.Inquiry(config, teacher=teacher).result() if config.prior.path is not None else None
        with ray_session(config.cluster, where):
            fitted = _fit(config)
            places.check_nodes(folder, places.named_paths(config))
            events = Events(folder)
            events.add("run started", stages=list(config.stages), command=sys.argv[1:])
            try:
                path = _stages(config, fitted, folder, events, hold, known)
            except BaseException as error:
                with contextlib.suppress(Exception):
                    events.add("run stopped", reason=type(error).__name__)
                raise
            events.add("run finished", seconds=round(time.time() - start, 1))
    say(f"finished   {', '.join(config.stages)} in {time.time() - start:.0f} s; everything is in {folder.uri}")
    return path


def _codebooks(config: RunConfig) -> int:
    return sum(m.quantizer is not None for m in plan_methods(config))


def _fit(config: RunConfig) -> RunConfig:
    """The configuration with pools that this Ray has room for; what depends on them is said, never a result.

    Raises:
        ValueError: When a wanted stage cannot fit, naming it and the key to change.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitted, words = demands.plan(config, _codebooks(config), nodes, may_grow=may_grow())
    for line in words:
        say(line)
    return fitted


def check_run_folder(config: RunConfig, folder: Folder) -> None:
    """Before Ray starts: refuse a run directory that another configuration made, naming both."""
    if config.overwrite:
        return
    Artifact(folder / "data", "prepare").check(prepare.identity(config))
    if "report" in config.stages and config.report.heldout_images:
        Artifact(folder / "heldout", "heldout").check({"heldout_images": config.report.heldout_images})
    for method in plan_methods(config):
        for place in method.images:
            if method.quantizer is not None:
                made = quantize.identity(config, method.quantizer)
                Artifact(folder / place / "codebook", "quantize").check(made)
                Artifact(folder / place / "images", "synthesize").check(synthesize.identity(config))
            Artifact(folder / place / "labels", "label").check(label.identity(config))


def _set_sizes(config: RunConfig, counts: Mapping[int, int]) -> dict[str, int]:
    """Images in a distilled set, and in `full` where it is wanted."""
    kept = [n for n in counts.values() if n >= config.ipc or config.small_class != "drop"]
    distilled = {"the distilled set": sum(min(n, config.ipc) for n in kept)}
    return distilled | ({"full": sum(counts.values())} if "full" in config.methods else {})


def _publish_config(asked: RunConfig, folder: Folder, environment: Mapping[str, object]) -> None:
    made_with = {"commit": commit(), "ddoq_ray": __version__, **environment}
    header = "".join(f"# {key}: {value}\n" for key, value in made_with.items())
    folder.publish("config.yaml", (header + to_yaml(asked)).encode())


def _stages(
    asked: RunConfig,
    config: RunConfig,
    folder: Folder,
    events: Events,
    hold: lease.Lease,
    known: networks.Networks | None,
) -> str | None:
    """Run what is wanted.

    Args:
        asked: The configuration as given, which is recorded.
        config: The same, with pools that fit the cluster.
        known: Facts of the networks; None where data is prepared for a prior that is yet to be chosen.
    """
    wanted = set(config.stages)
    methods = plan_methods(config)
    rows = student_rows(config, methods)
    image_folders = list(dict.fromkeys(f for m in methods for f in m.images))
    codebooks = {m.name: m.images[0] for m in methods if m.quantizer is not None}

    # Every stage needs the index of the data; making it is cheap, and a finished one is reused.
    with doing("prepare"):
        data = prepare.run(config, folder, events)
    if known is None:
        assert wanted == {"prepare"}, wanted
        _publish_config(asked, folder, {})
        return None
    if wanted & {"quantize", "synthesize"}:
        prepare.check_small_classes(config, data.counts, data.classes)
    data = mapping.resolve(data, known, required=wanted != {"prepare"})
    if "train" in wanted:
        networks.check_batches(_set_sizes(config, data.counts), config, known)
        check_full(config, data)
    # Before anything is spent: a wrong class mapping, or validation images that cannot be read.
    checked = None
    if "label" in wanted:
        checked = teacher_check.check_early(config, folder, image_folders, data, events, known)
    _publish_config(asked, folder, known.environment)

    latents = Folder(config.latents.path) if config.latents.path else folder / "latents"
    if wanted & {"encode", "quantize"}:
        # Quantizers pull the latent log while encoders still write it.
        quantizers = [
            quantize.Quantizers(config, folder, m.images[0], m.quantizer, data, latents, known)
            for m in methods
            if m.quantizer is not None and "quantize" in wanted
        ]
        check_memory([need for q in quantizers for need in q.needs])

        def on_shard(shard: int) -> None:
            for q in quantizers:
                q.shard_done(shard)

        try:
            for q in quantizers:
                q.launch()
            with doing("encode"):
                if "encode" in wanted and not config.latents.path:
                    encode.run(config, folder, data, events, networks=known, on_shard=on_shard)
                else:
                    encode.reuse(latents, data, known, on_shard)
            with doing("quantize"):
                for q in quantizers:
                    q.finish(events)
        finally:
            for q in quantizers:
                q.close()
    hold.check()
    if "synthesize" in wanted:
        made = [m.images[0] for m in methods if m.quantizer is not None]
        with doing("synthesize"):
            synthesize.run(config, folder, made, data, events, known)
        for m in methods:
            if m.name in select.METHODS:
                for k, place in enumerate(m.images):
                    with doing(m.name):
                        select.run(config, folder, place, data, latents, events, k, method=m.name)
    hold.check()
    if "label" in wanted:
        with doing("label"):
            label.run(config, folder, image_folders, data, events, known, teacher=checked)
    # Started here, waited for by the report: it takes no time of its own while students train.
    unseen = heldout.Heldout(config, folder, data, known, latents) if "report" in wanted else None
    if "train" in wanted:
        with signals.own_ctrl_c(), doing("train"):
            train.run(config, folder, rows, data, events, known)
    hold.check()
    if "evaluate" in wanted:
        with doing("evaluate"):
            evaluate.run(config, folder, rows, data, events)
    path = None
    if unseen is not None:
        # ddoq-sqrt beside ddoq has the same images: the page shows them once.
        shown = {m.name: m.images[0] for m in methods if m.images and (m.quantizer or m.name in select.METHODS)}
        path = report.run(asked, folder, data, known, latents, unseen, codebooks, shown, image_folders, rows, events)
    if not config.latents.keep:
        encode.discard(folder / "latents", events)
        encode.discard(folder / "heldout", events)
    return path


def distill(*overrides: str, run_dir: str | os.PathLike[str] | None = None) -> str:
    """Run from a notebook: ``distill("ipc=1", "quantizer=gram")``; returns the run directory.

    Args:
        overrides: `key=value` as on the command line.
        run_dir: Where everything goes; by default runs/<dataset>-ipc<ipc>.
    """
    config = load_config([*overrides, *([f"run_dir={os.fspath(run_dir)}"] if run_dir is not None else [])])
    run(config)
    return Folder(config.folder).uri
