"""The stages in order, top to bottom: the only file that knows them all.

A run's own method lives in the run directory itself; every other method has the same folders under
``compare/<method>-ipc<K>/``. Latents, data and the teacher are shared.
"""

from __future__ import annotations

import os
import posixpath
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddoq_ray import __version__
from ddoq_ray.artifacts import Artifact, Folder
from ddoq_ray.config import RunConfig
from ddoq_ray.config.compose import load_config, to_yaml
from ddoq_ray.config.quantizer import MinibatchKmeansConfig, QuantizerConfig
from ddoq_ray.records import StudentRow
from ddoq_ray.runtime import Events, commit, ray_session, say
from ddoq_ray.stages import (
    encode,
    evaluate,
    heldout,
    label,
    mapping,
    networks,
    prepare,
    quantize,
    report,
    select,
    synthesize,
    train,
)
from ddoq_ray.stages.quantize_memory import check_memory


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
    folder = Folder(config.folder)
    folder.check_writable()
    check_run_folder(config, folder)
    wanted = set(config.stages)
    # Before Ray and before any stage begins: what cannot work is said now.
    known = networks.Inquiry(config, teacher=bool(wanted & {"label", "train", "evaluate"})).result()
    with ray_session(config.cluster):
        events = Events(folder)
        events.add("run started", stages=list(config.stages), command=sys.argv[1:])
        path = _stages(config, folder, events, wanted, known)
        events.add("run finished", seconds=round(time.time() - start, 1))
    say(f"finished   {', '.join(config.stages)} in {time.time() - start:.0f} s; everything is in {folder.uri}")
    return path


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


def _stages(
    config: RunConfig, folder: Folder, events: Events, wanted: set[str], known: networks.Networks
) -> str | None:
    methods = plan_methods(config)
    rows = student_rows(config, methods)
    image_folders = list(dict.fromkeys(f for m in methods for f in m.images))
    codebooks = {m.name: m.images[0] for m in methods if m.quantizer is not None}

    # Every stage needs the index of the data; making it is cheap, and a finished one is reused.
    data = prepare.run(config, folder, events)
    if wanted & {"quantize", "synthesize"}:
        prepare.check_small_classes(config, data.counts, data.classes)
    if "train" in wanted:
        networks.check_batches(_set_sizes(config, data.counts), config, known)
    data = mapping.resolve(data, known, required=wanted != {"prepare"})
    made_with = {"commit": commit(), "ddoq_ray": __version__, **known.environment}
    header = "".join(f"# {key}: {value}\n" for key, value in made_with.items())
    folder.publish("config.yaml", (header + to_yaml(config)).encode())

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
            if "encode" in wanted and not config.latents.path:
                encode.run(config, folder, data, events, networks=known, on_shard=on_shard)
            else:
                encode.reuse(latents, data, known, on_shard)
            for q in quantizers:
                q.finish(events)
        finally:
            for q in quantizers:
                q.close()
    if "synthesize" in wanted:
        made = [m.images[0] for m in methods if m.quantizer is not None]
        synthesize.run(config, folder, made, data, events, known)
        for m in methods:
            if m.name in select.METHODS:
                for k, place in enumerate(m.images):
                    select.run(config, folder, place, data, latents, events, k, method=m.name)
    if "label" in wanted:
        label.run(config, folder, image_folders, data, events, known)
    # Started here, waited for by the report: it takes no time of its own while students train.
    unseen = heldout.Heldout(config, folder, data, known, latents) if "report" in wanted else None
    if "train" in wanted:
        train.run(config, folder, rows, data, events, known)
    if "evaluate" in wanted:
        evaluate.run(config, folder, rows, data, events)
    path = None
    if unseen is not None:
        # ddoq-sqrt beside ddoq has the same images: the page shows them once.
        shown = {m.name: m.images[0] for m in methods if m.images and (m.quantizer or m.name in select.METHODS)}
        path = report.run(config, folder, data, known, latents, unseen, codebooks, shown, image_folders, rows, events)
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
