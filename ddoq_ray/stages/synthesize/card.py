"""The dataset card of an image set: ``README.md``, by which a hub shows the folder and libraries find its data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import DatasetCard, DatasetCardData

from ddoq_ray.config.methods import SPECS
from ddoq_ray.storage.layout import IMAGE_SHARDS

SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)  # as hubs name them
LISTED = 1000  # classes; of all others the sidecars have the words


@dataclass(frozen=True)
class CardFacts:
    """What a card says of its set.

    Attributes:
        name: A word for the data that was distilled.
        method: The method's word in tables.
        prior: A word for the prior; what `prior_id`, a digest, stands for.
        teacher: A word for the teacher of the run; None for a run without one.
        ipc: Images asked for a class; a class may have fewer.
        images: How many there are.
        shards: In how many tars.
        side: Of an image, in pixels.
        extension: Of the picture files.
        digest: Of the shards.
        classes: Their words, in the labels' order.
        seed: Of the noise.
    """

    name: str
    method: str
    prior: str
    prior_id: str
    teacher: str | None
    ipc: int
    images: int
    shards: int
    side: int
    extension: str
    digest: str
    classes: Sequence[str]
    seed: int


def title_of(path: str) -> str:
    """A word for a network by its path: the last part, so that no folder of this machine is told."""
    return re.split(r"[/:]", path.rstrip("/"))[-1]


def dataset_card(facts: CardFacts) -> str:
    """The text of a card, whose head names the shards as the split `train` and leaves the licence to fill in."""
    title = f"{facts.name} distilled by {facts.method}, {facts.ipc} images a class"
    data = DatasetCardData(
        license="unknown",
        task_categories=["image-classification"],
        size_categories=[next((word for most, word in SIZES if facts.images < most), "n>100M")],
        tags=["dataset-distillation", "ddoq_ray", "webdataset"],
        pretty_name=title,
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": IMAGE_SHARDS}]}],
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{_body(title, facts)}"))


def _body(title: str, facts: CardFacts) -> str:
    rows = {
        "method": f"`{facts.method}`",
        "prior": f"{facts.prior} (`{facts.prior_id}`)",
        "teacher": facts.teacher or "none",
        "images a class": f"{facts.ipc:,}",
        "classes": f"{len(facts.classes):,}",
        "images": f"{facts.images:,}, in {facts.shards:,} tars",
        "side": f"{facts.side} px, stored as {facts.extension}",
        "seed": str(facts.seed),
        "digest": f"`{facts.digest}`",
        "licence": "to be filled in, here and as `license` above: the terms of the data and of the prior apply",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items())
    shown = "\n".join(f"| {i} | {_cell(words)} |" for i, words in enumerate(facts.classes[:LISTED]))
    more = len(facts.classes) - LISTED
    rest = f"\n\nand {more:,} more; `prompt` in each image's JSON has the words of its class." if more > 0 else ""
    return f"""# {title}

A small synthetic dataset that stands for a large one. {SPECS[facts.method].words}

| | |
|---|---|
{table}

## How to load it

A WebDataset: `{facts.extension}` is the image, `cls` its label, `json` what else is known of it. `weight` in there is
the share of the class's real images that the image stands for; the weights of a class sum to 1.

```python
from datasets import load_dataset

row = load_dataset("path/to/this/folder", split="train")[0]
image, label, weight = row["{facts.extension}"], row["cls"], row["json"]["weight"]
```

```python
import ddoq_ray

dataset = ddoq_ray.load("path/to/this/folder")  # a torch dataset of (image, label, weight)
```

## Classes

| label | class |
|---|---|
{shown}{rest}
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
