"""How centroids become natural images: start, strength or guide, rescaling and candidates on CIFAR-10.

Rows of real images (random, random through the autoencoder, medoids) and of plain decoding stand beside. Labels are
ResNet-56's; candidates are judged by ResNet-20, so that the teacher that is learnt from has chosen nothing. What is
chosen by these figures is chosen on the selection split; `--split reported` scores the other test images.
A row that is in the work folder is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.provenance import finish, parser
from ddoq_ray.config.training import ProtocolConfig
from ddoq_ray.core.rescaling import rescaled
from ddoq_ray.models.candidates import Candidates
from ddoq_ray.models.classifiers import load_classifier
from ddoq_ray.models.fidelity import judge_autoencoder, reconstructions
from ddoq_ray.models.priors.base import Prior, Sampling
from ddoq_ray.models.priors.load import load_prior
from ddoq_ray.models.synthesis import Asked, Synthesizer
from studies.assets import CIFAR10, write_cifar10_teacher
from studies.small_images import CLASSES, Codebooks, Distilled, Split, chosen, cifar10, even, protocol, top1

STEPS = 25
REAL = ("random", "random-ae", "medoids")


@dataclass(frozen=True)
class Case:
    """A row: a method of real images, or settings of the synthesizer."""

    method: str = "ddoq"
    start: str | None = None
    strength: float | None = None
    guidance: float | None = None
    guide_until: float | None = None
    guide_scale: float | None = None
    guide_pool: int | None = None
    rescale: bool = False
    candidates: int = 1
    keep: str = "confident"

    @property
    def facts(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}

    def sampling(self) -> Sampling:
        if self.start == "decode":
            return Sampling(0.0, STEPS)
        given: dict[str, Any] = {
            key: getattr(self, key)
            for key in ("strength", "guidance", "guide_until", "guide_scale", "guide_pool")
            if getattr(self, key) is not None
        }
        return Sampling(**({"strength": 1.0} | given), steps=STEPS, start=self.start)  # type: ignore[arg-type]


def cases(ipc: int, candidates: int) -> list[Case]:
    """The table's rows."""
    rows = [Case(method) for method in REAL] + [Case(start="decode")]
    rows += [Case(start="decode", rescale=True)] if ipc > 1 else []
    for best in (1, candidates):
        rows += [Case(start="noised", strength=s, guidance=3.0, candidates=best) for s in (0.4, 0.6, 0.8)]
        rows += [Case(start="noise", guidance=3.0, candidates=best)]
        rows += [
            Case(start="guided", guidance=3.0, guide_until=until, guide_scale=scale, guide_pool=pool, candidates=best)
            for until, scale, pool in ((0.5, 0.3, 1), (0.8, 0.3, 1), (0.8, 0.1, 1), (0.5, 0.3, 4))
        ]
    if ipc > 1:
        rows += [
            Case(start="noised", strength=0.6, guidance=3.0, rescale=True, candidates=candidates),
            Case(start="guided", guidance=3.0, guide_until=0.8, guide_scale=0.3, guide_pool=1, rescale=True,
                 candidates=candidates),
            Case(start="guided", guidance=3.0, guide_until=0.8, guide_scale=0.3, guide_pool=1, candidates=candidates,
                 keep="cell"),
        ]  # fmt: skip
    return rows


def case_of(words: str) -> Case:
    """The row that words ask for.

    >>> case_of("start=noised strength=0.6 guidance=1 candidates=1").facts["guidance"]
    1
    """
    given = dict(word.split("=", 1) for word in words.split())
    texts = ("method", "start", "keep")
    typed: dict[str, Any] = {key: value if key in texts else json.loads(value) for key, value in given.items()}
    return Case(**typed)


@dataclass
class Seat:
    """What all rows share; `maker` is the prior of the codebooks as images are made with it."""

    codebooks: Codebooks
    maker: Prior
    judge: Any
    teacher: Any
    scored: Split
    precision: Literal["float32", "bfloat16"]

    def top1(self, case: Case, ipc: int, rule: ProtocolConfig, seed: int) -> float:
        """Of one student, in %."""
        return top1(self.images(case, ipc, seed), self.teacher, self.scored, rule, seed, self.precision)

    def images(self, case: Case, ipc: int, seed: int) -> Distilled:
        """The set of a case; for the same seed, the same one."""
        train = self.codebooks.train
        if case.method in ("random", "random-ae"):
            rows = chosen(train, ipc, seed)
            images = train.images[rows]
            if case.method == "random-ae":
                images = reconstructions(self.codebooks.prior.autoencoder, images)
            return even(images, train.class_ids[rows])
        books = self.codebooks.of(ipc)
        if case.method == "medoids":
            rows = np.concatenate([book[3] for book in books.values()])
            return even(train.images[rows], train.class_ids[rows])
        asked = Asked(
            np.concatenate([rescaled(*book[:3]) if case.rescale else book[0] for book in books.values()]),
            [CLASSES[c] for c, book in books.items() for _ in book[0]],
            [k for book in books.values() for k in range(len(book[0]))],
        )
        candidates = Candidates(case.candidates, self.judge, case.keep) if case.candidates > 1 else None  # type: ignore[arg-type]
        made = Synthesizer(self.maker, seed, 50, candidates).pictures(
            asked, case.sampling(), {c: book[0] for c, book in books.items()}
        )
        class_ids = np.repeat(np.arange(len(CIFAR10)), [len(book[0]) for book in books.values()])
        weights = np.concatenate([book[1] for book in books.values()])
        return Distilled(np.ascontiguousarray(made.pictures.transpose(0, 3, 1, 2)), class_ids, weights)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--prior", required=True, help="the prior's folder")
    arguments.add_argument("--teacher", help="who labels, as teacher.path, instead of the ResNet-56 of the assets")
    arguments.add_argument("--work", type=Path, required=True, help="folder that keeps latents and finished rows")
    arguments.add_argument("--ipc", type=int, nargs="+", default=[10, 1])
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--candidates", type=int, default=8)
    arguments.add_argument("--epochs", type=int, help="another number than the protocol's, for a look")
    arguments.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16",
        help="of students, teacher and denoiser: float32 is quicker where a processor has no bfloat16",
    )  # fmt: skip
    arguments.add_argument("--split", choices=("selection", "reported"), default="selection")
    arguments.add_argument("--only", nargs="*", default=[], help="words of the rows to compute, such as start=noise")
    arguments.add_argument(
        "--case", nargs="*", type=case_of, help="rows in place of the table's: 'start=noised strength=0.6 guidance=1'"
    )
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    train, selection, reported = cifar10()
    scored = selection if asked.split == "selection" else reported
    judge, teacher = (
        load_classifier(write_cifar10_teacher(depth, asked.work / f"resnet{depth}")) for depth in (20, 56)
    )
    named = "resnet56-cifar"
    if asked.teacher is not None:
        teacher = load_classifier(asked.teacher)
        named = f"{teacher.arch} {teacher.id}"
    teacher.to(memory_format=torch.channels_last)
    codebooks = Codebooks(load_prior(asked.prior), train, asked.work)
    # The same prior in the arithmetic of the students.
    maker = load_prior(asked.prior, dtype=asked.precision, channels_last=True)
    seat = Seat(codebooks, maker, judge, teacher, scored, asked.precision)
    about = {
        "dataset": "cifar10", "split": asked.split, "prior": codebooks.prior.id, "student": "convnet3",
        "teacher": named, "judge": "resnet20-cifar", "arithmetic": f"{asked.precision}, compiled",
        "epochs": protocol(1, asked.epochs).epochs,
    }  # fmt: skip
    kept = judge_autoencoder(codebooks.prior.autoencoder, teacher, selection.images, selection.class_ids)
    print(f"autoencoder, by the teacher, on the selection split: {kept}", flush=True)
    rows = []
    for ipc in asked.ipc:
        for case in asked.case or cases(ipc, asked.candidates):
            facts = about | {"ipc": ipc} | case.facts
            if case.method == "random":
                del facts["prior"]  # it has no part in these rows
            if asked.only and not any(word in json.dumps(case.facts) for word in asked.only):
                continue
            rule, finished = protocol(ipc, asked.epochs), Finished(asked.work / "rows.jsonl", facts)
            find = partial(seat.top1, case, ipc, rule)
            scores = [finished.score(seed, find) for seed in range(asked.seeds)]
            mean, std = float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None
            rows.append(facts | {"seeds": len(scores), "top1_mean": mean, "top1_std": std, "top1": scores})
            print(f"ipc {ipc} {case.facts}: {mean:.2f} {scores}", flush=True)
    columns = ["ipc", "method", "start", "strength", "guidance", "guide_until", "guide_scale", "guide_pool", "rescale",
               "candidates", "keep", "top1_mean", "top1_std", "seeds"]  # fmt: skip
    finish(rows, columns, asked.json)


@dataclass(frozen=True)
class Finished:
    """Figures that an earlier, perhaps cut-off, study found: one line each, known by all that they follow from."""

    file: Path
    facts: Mapping[str, Any]

    def score(self, seed: int, find: Callable[[int], float]) -> float:
        key = json.dumps({**self.facts, "seed": seed}, sort_keys=True)
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            row = json.loads(line)
            if row["key"] == key:
                return float(row["top1"])
        found = find(seed)
        with self.file.open("a") as f:
            f.write(json.dumps({"key": key, "top1": found}) + "\n")
        return found


if __name__ == "__main__":
    main()
