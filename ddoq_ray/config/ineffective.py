"""The rules for keys that are given although another key makes them do nothing: each is refused, with what to do.

What depends on the data itself, such as a label's column for shards that turn out to be read where they are, is refused
where the data is looked at (`WRITTEN` is here for it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Keys of the dataset that say how shards are written; of WebDataset shards, only with dataset.resort.
WRITTEN = ("heldout", "label_column", "image_column", "shard_samples", "shard_mb")
# Kinds of collections that a key of the dataset is for, where not for all that are packed; None is found out later.
_KINDS = {
    "resort": (None, "webdataset"),
    "label_column": (None, "imagefolder", "parquet"),
    "image_column": (None, "parquet"),
}
_READ_IN_PLACE = "shards are read where they are; set dataset.resort=true to write them anew"

# (key, or prefix that ends with a dot; when it has no effect; why). `config` has the groups of the keys that are given.
Rule = tuple[str, Callable[[Any], bool], Callable[[Any], str]]


def _of_kind(key: str) -> Callable[[Any], bool]:
    return lambda c: c.dataset.kind == "digits" or c.dataset.kind not in _KINDS.get(key, (c.dataset.kind,))


def _kind(c: Any) -> str:
    return f"dataset.source={c.dataset.kind}"


def _packing(key: str) -> list[Rule]:
    """Rules of a key that says how shards are written."""
    given = _of_kind(key)
    rules: list[Rule] = [(f"dataset.{key}", given, lambda c: f"with {_kind(c)}; leave it out")]
    if key in WRITTEN:
        in_place: Callable[[Any], bool] = lambda c: c.dataset.kind == "webdataset" and not c.dataset.resort
        rules.append((f"dataset.{key}", in_place, lambda c: f"here: {_READ_IN_PLACE}"))
    return rules


def _fixed(why: str) -> Callable[[Any], str]:
    return lambda _: f"here: {why}; leave one of the two out"


# Keys of a run, and the key of a comparison that lists several of them.
_LISTED = (
    ("ipc", "ipcs"),
    ("student", "students"),
    ("student.arch", "students"),
    ("teacher", "teachers"),
    ("teacher.path", "teachers"),
    ("protocol.batch", "batches"),
)


def _listed(key: str, listed: str) -> Rule:
    given: Callable[[Any], bool] = lambda c: getattr(c, "compared", False) and bool(getattr(c, listed))
    return key, given, lambda _: f"in a comparison: {listed} lists what is compared; leave one of the two out"


_RULES: tuple[Rule, ...] = (
    (
        "dataset.source",
        lambda c: c.dataset.path is not None and c.dataset.source == "digits",
        _fixed("dataset.path gives the data"),
    ),
    *(
        (
            f"dataset.{key}",
            lambda c: c.dataset.path is None and c.dataset.source != "torchvision",
            lambda _: "without dataset.path; set dataset.path too",
        )
        for key in ("val_path", "classes")
    ),
    (
        "dataset.val_path",
        lambda c: c.dataset.source in ("torchvision", "idx"),
        lambda c: f"with {_kind(c)}, which has its own validation part; leave it out",
    ),
    ("dataset.heldout", lambda c: c.dataset.val_path is not None, _fixed("dataset.val_path gives validation images")),
    *(rule for key in ("resort", *WRITTEN) for rule in _packing(key)),
    (
        "tracking",
        lambda c: "report" not in c.stages,
        lambda _: "without the stage report, which hands results over; leave it out, or add report to stages",
    ),
    (
        "latents.keep",
        lambda c: c.latents.path is not None and not c.latents.keep,
        lambda _: "with latents.path: a run never removes another run's latents; leave it out",
    ),
    (
        "latents.path",
        lambda c: c.stages == ("encode",),
        lambda _: "on the encode stage alone; leave it out, or run the stages after it",
    ),
    ("encoder.", lambda c: c.latents.path is not None, _fixed("latents.path gives latents that are already encoded")),
    *(
        (f"prior.{key}", lambda c: c.prior.autoencoder_only, _fixed("prior.autoencoder_only takes no denoiser"))
        for key in ("scheduler", "negative_prompt")
    ),
    (
        "synthesizer.strength",
        lambda c: c.synthesizer.start in ("noise", "guided"),
        lambda c: f"here: synthesizer.start={c.synthesizer.start} begins with pure noise; leave one of the two out",
    ),
    *(
        (f"synthesizer.{key}", lambda c: c.synthesizer.start != "guided", _fixed("synthesizer.start is not guided"))
        for key in ("guide_until", "guide_scale", "guide_pool")
    ),
    *(
        (f"synthesizer.{key}", lambda c: c.synthesizer.candidates == 1, _fixed("synthesizer.candidates=1 leaves none"))
        for key in ("keep", "judge")
    ),
    (
        "synthesizer.rescale",
        lambda c: c.synthesizer.start == "noise",
        _fixed("synthesizer.start=noise ignores the centroids"),
    ),
    (
        "synthesizer.retries",
        lambda c: c.synthesizer.noiseless,
        _fixed("synthesizer.strength=0 adds no noise that could be other"),
    ),
    (
        "synthesizer.quality",
        lambda c: c.synthesizer.format == "png",
        _fixed("synthesizer.format=png keeps every pixel as it is"),
    ),
    ("labels.budget", lambda c: c.labels.mode != "auto", _fixed("labels.mode names the codec")),
    *(
        (
            f"labels.{key}",
            lambda c: not c.labels.stored,
            lambda c: f"here: labels.mode={c.labels.mode} stores no labels; leave one of the two out",
        )
        for key in ("workers", "epochs", "file_mb", "file_labels")
    ),
    *(
        (f"protocol.{key}", lambda c: c.labels.mode == "hard", _fixed("labels.mode=hard takes no soft labels"))
        for key in ("temperature", "direction")
    ),
    ("protocol.label_smoothing", lambda c: c.labels.mode != "hard", _fixed("labels.mode is not hard")),
    ("protocol.momentum", lambda c: c.protocol.optimizer != "sgd", _fixed("protocol.optimizer is not sgd")),
    ("protocol.cosine_span", lambda c: c.protocol.schedule != "cosine", _fixed("protocol.schedule is not cosine")),
    (
        "weights.cutmix",
        lambda c: not c.protocol.cutmix and not c.protocol.mixup,
        _fixed("protocol.cutmix=false pastes nothing"),
    ),
    ("images.name", lambda c: c.images.path is None, lambda _: "without images.path; set images.path too"),
    ("rded.", lambda c: "rded" not in c.methods, _fixed("`rded` is not among baselines")),
    (
        "recovery.",
        lambda c: not {"sre2l", "cda"} & set(c.methods),
        _fixed("neither `sre2l` nor `cda` is among baselines"),
    ),
    ("protocol.full_epochs", lambda c: "full" not in c.methods, _fixed("`full` is not among baselines")),
    ("protocol.step_factor", lambda c: c.protocol.schedule != "step", _fixed("protocol.schedule is not step")),
    *(_listed(key, listed) for key, listed in _LISTED),
    *(
        (key, lambda c: c.compared, lambda _: "in a comparison: `methods` lists what is compared; leave it out")
        for key in ("baselines", "weights", "weights.scheme")
    ),
    (
        "cluster.num_cpus",
        lambda c: c.cluster.address not in (None, "local"),
        _fixed("cluster.address joins a cluster as it is"),
    ),
)


def check_effective(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse the first key that has no effect.

    Args:
        config: What was composed, of a run or of another command.
        given: The keys that were given, with their values; null, false and 0 of the dataset's ask for nothing.

    Raises:
        ValueError: Naming the key, why it has no effect and what to do.
    """
    for prefix, when, why in _RULES:
        for key, value in given.items():
            named = key == prefix or (prefix.endswith(".") and key.startswith(prefix))
            if not named or (key.startswith("dataset.") and not value) or not when(config):
                continue
            raise ValueError(f"{key}{'=false' if value is False else ''} has no effect {why(config)}")
